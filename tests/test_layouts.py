"""Layouts by the command line: hsdp on two made-up nodes, gathered weights kept, a layout by the plan."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, Finished, checkpoint, environment, launch, metrics, wait
from tests import ROOT

pytestmark = pytest.mark.slow
STEPS = [
    "--total-steps",
    6,
    "--checkpoint-interval",
    3,
    "--sample-interval",
    0,
    "--replica-check-interval",
    1,
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=90, length=600)
    return ["--tokenizer-path", str(tokenizer), "--data-glob", glob]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """Six steps of eight sequences in one process."""
    output = tmp_path_factory.mktemp("alone")
    flags = [*data, *SHAPE, *SCHEDULE, "--global-batch-size", 8, *STEPS, "--output-dir", output]
    finished = launch(1, *flags)
    assert finished.code == 0, finished.stderr
    return output


def launch_nodes(processes: int, node: int, *flags: Any) -> list[Finished]:
    """Processes started by hand that are told to be nodes of ``node`` ranks."""
    with socket.socket() as trial:
        trial.bind(("localhost", 0))
        port = trial.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank % node), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(node), "MASTER_PORT": str(port), "MASTER_ADDR": "localhost",
        }  # fmt: skip
        script = [sys.executable, str(ROOT / "resume_pretrain_tensor.py"), *map(str, flags)]
        started.append(
            subprocess.Popen(
                script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**environment(), **place},
            )
        )  # fmt: skip
    return [wait(process, timeout=500) for process in started]


def agree(output: Path, alone: Path, first: int = 0) -> None:
    """Tokens, losses and norms of the steps after ``first``."""
    for mine, theirs in zip(metrics(output)[-6 + first :], metrics(alone)[first:], strict=True):
        assert mine["stream_hash"] == theirs["stream_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-4)


def weights(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def hsdp_run(output: Path, data: list[str], processes: int, tp_size: int, *more: Any) -> Finished:
    flags = [*data, *SHAPE, *SCHEDULE, *STEPS, "--global-batch-size", 8, "--batch-size", 1, *more]
    layout = ["--tensor-parallel-size", tp_size, "--data-parallel", "hsdp", "--output-dir", output]
    done = launch_nodes(processes, processes // 2, *flags, *layout)
    assert all(finished.code == 0 for finished in done), [finished.stderr[-2000:] for finished in done]
    return done[0]


@pytest.mark.parametrize(("processes", "tp_size"), [(4, 1), (8, 2)])
def test_hsdp_trains_like_one_process_and_goes_on_elsewhere(
    tmp_path: Path, data: list[str], alone: Path, processes: int, tp_size: int
) -> None:
    first = hsdp_run(tmp_path / "nodes", data, processes, tp_size)
    assert "Replicas: share weights and state within a node, each node has a copy (hsdp)" in first.stdout
    agree(tmp_path / "nodes", alone)
    halfway = checkpoint(tmp_path / "nodes", 3)
    (tmp_path / "fsdp" / "pretrained").mkdir(parents=True)
    shutil.copy(halfway, tmp_path / "fsdp" / "pretrained")
    flags = [*data, *SHAPE, *SCHEDULE, *STEPS, "--global-batch-size", 8, "--batch-size", 1]
    resumed = launch(4, *flags, "--tensor-parallel-size", 2, "--output-dir", tmp_path / "fsdp")
    assert resumed.code == 0, resumed.stderr
    assert "Changed since the checkpoint: --data-parallel was hsdp, is fsdp" in resumed.stdout
    agree(tmp_path / "fsdp", alone, first=3)


def test_one_process_goes_on_as_hsdp_with_kept_weights_and_background_saves(
    tmp_path: Path, data: list[str], alone: Path
) -> None:
    (tmp_path / "pretrained").mkdir()
    shutil.copy(checkpoint(alone, 3), tmp_path / "pretrained")
    hsdp_run(tmp_path, data, 4, 1, "--reshard-after-forward", "off", "--async-checkpoint", "on")
    agree(tmp_path, alone, first=3)
    mine, theirs = weights(checkpoint(tmp_path, 6)), weights(checkpoint(alone, 6))
    for name, tensor in theirs["model_state_dict"].items():
        error = (mine["model_state_dict"][name] - tensor).norm() / tensor.norm()
        assert error < 2e-3, name


def test_one_replica_a_node_is_refused_in_a_line(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, *SHAPE, "--tensor-parallel-size", 2, "--data-parallel", "hsdp", "--output-dir", tmp_path]
    done = launch_nodes(4, 2, *flags)
    assert {finished.code for finished in done} == {2}
    assert "--data-parallel hsdp shares weights and state among the replicas of a node" in done[0].stderr


def test_auto_chooses_says_so_and_keeps_what_was_asked(tmp_path: Path, data: list[str], alone: Path) -> None:
    flags = [*data, *SHAPE, *SCHEDULE, *STEPS, "--tensor-parallel-size", "auto", "--output-dir", tmp_path]
    finished = launch(4, *flags)  # 2 sequences a rank: 8 a step
    assert finished.code == 0, finished.stderr
    assert "Chosen by --tensor-parallel-size auto: --tensor-parallel-size" in finished.stdout
    assert "--batch-size 2 a GPU x 1 accumulated x 4 GPUs = 8 sequences a step" in finished.stdout
    assert "Batch: 8 sequences of 64 tokens" in finished.stdout
    agree(tmp_path, alone)
    kept = (tmp_path / "stats" / "run_config.toml").read_text()
    assert 'tensor-parallel-size = "auto"' in kept and "batch-size = 2" in kept
    assert "# tensor-parallel-size auto chose: --tensor-parallel-size" in kept
    more = ["--config", tmp_path / "stats" / "run_config.toml", "--total-steps", 8]
    smaller = launch(2, *more)
    assert smaller.code == 0, smaller.stderr
    assert "a step had 8 sequences at the checkpoint and has 4 on these ranks" in smaller.stdout
