"""What CUDA, NCCL and the allocator find in the environment, for every way to start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.ranks.gpu_environment import one_queue_helps, set_gpu_environment
from argonne.ranks.launch import Environment
from tests import ROOT


def one_queue_of(ranks: int, per_node: int | None, tp_size: int | None, heads: int, fsdp: bool) -> bool:
    variables = {"RANK": "0", "WORLD_SIZE": str(ranks)}
    if per_node is not None:
        variables["LOCAL_WORLD_SIZE"] = str(per_node)
    return one_queue_helps(Environment.read(environ=variables), tp_size, heads, fsdp=fsdp)


@pytest.mark.parametrize(
    ("ranks", "per_node", "tp_size", "heads", "fsdp", "expected"),
    [
        (8, 8, None, 24, True, True),  # tp 8, one replica
        (8, None, None, 24, True, True),  # started by hand
        (16, 8, None, 24, True, False),  # FSDP2 over two nodes
        (16, 8, None, 24, False, True),  # DDP
        (8, 8, 4, 24, True, False),
        (8, 8, 1, 24, True, False),
        (8, 8, 1, 24, False, False),
        (8, 8, None, 6, True, False),  # tp 2 x dp 4
        (8, 8, None, 16, True, True),
        (1, 1, None, 24, True, False),
    ],
)
def test_one_queue_only_under_tensor_parallelism_without_fsdp2(
    ranks: int, per_node: int | None, tp_size: int | None, heads: int, fsdp: bool, expected: bool
) -> None:
    one_queue = one_queue_of(ranks, per_node, tp_size, heads, fsdp)
    assert one_queue is expected
    environ: dict[str, str] = {}
    set_gpu_environment(environ, one_queue=one_queue)
    assert environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == ("1" if expected else None)


def test_torchs_own_error_handling_and_segments_that_grow() -> None:
    environ: dict[str, str] = {}
    set_gpu_environment(environ, one_queue=True)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in environ
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True" and environ["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_set_is_kept(name: str) -> None:
    mine = {
        name: "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "eth7",
    }  # fmt: skip
    environ = dict(mine)
    set_gpu_environment(environ, one_queue=True)
    assert environ == {**mine, "GLOO_SOCKET_IFNAME": "eth7"}


FIRST_IMPORT = """
import os, runpy, sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "lm_eval"):  # lm_eval imports torch, and may be missing here
            found = [os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "NCCL_DEBUG")]
            print("torch finds", *found, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Spy())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a command up to its first import of torch."""

COMMANDS = {
    "resume_pretrain_tensor.py": ["--tokenizer-path", "any"],
    "scripts/preflight.py": ["--tokenizer-path", "any"],
    "scripts/generate.py": ["--checkpoint-path", "any", "--tokenizer-path", "any"],
    "scripts/evaluate.py": ["--checkpoint-path", "any", "--tokenizer-path", "any", "--tasks", "arc_easy"],
    "scripts/tensor_parallel_practice.py": [],
    "scripts/benchmark.py": ["gpu"],
}
"""Commands that use a GPU where there is one, with the least that they ask for."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_uses_a_gpu_prepares_it_before_torch(command: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", FIRST_IMPORT, str(ROOT / command), *COMMANDS[command]]
    done = subprocess.run(
        arguments, cwd=tmp_path, env={**clean(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert "torch finds expandable_segments:True WARN" in done.stdout, done.stderr


def clean() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NCCL_", "CUDA_", "PYTORCH_", "RANK", "WORLD_SIZE", "LOCAL_"))
    }


def test_no_command_that_uses_a_gpu_is_missing() -> None:
    """Commands that choose a device or join ranks, by what they import, are listed above or named here."""
    others = {
        "scripts/launch_torchrun.py",  # starts the training script
        "scripts/replay_step.py",  # reads a run first: see tests/scripts/test_replay_step.py
        "scripts/verify_tensor_parallel.py",  # on the CPU alone
    }
    uses = re.compile(r"choose_device|init_process_group|torch\.cuda|nccl|tools\.preflight|lm_eval|--device")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in [ROOT / "resume_pretrain_tensor.py", *sorted((ROOT / "scripts").glob("*.py"))]
        if uses.search(path.read_text())
    }
    assert found - others == set(COMMANDS)
