"""The practice lesson: right on every number of ranks, and not to be fooled."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_practice
import torch
from torch import Tensor

import argonne.tools.practice_layers as practice_layers
from argonne.testing.launch import ROOT, environment
from argonne.tools.practice_layers import Trial, attention_pair, linear_pair, mlp_pair, naive_mlp_pair, run
from argonne.tools.practice_lesson import teach
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import simulate

SCRIPT = str(ROOT / "scripts" / "tensor_parallel_practice.py")
CPU = torch.device("cpu")


def taught(size: int) -> tuple[list[str], list[str]]:
    """The lesson on simulated ranks: what rank 0 said, and what it found to differ."""
    kept: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    said: list[str] = []

    def work(group: SimulatedTPGroup) -> list[str]:
        def from_all(own: Any) -> list[Any]:
            kept[group.rank] = own
            barrier.wait(60)
            every = list(kept)
            barrier.wait(60)
            return every

        def say(line: str) -> None:
            if group.rank == 0:
                said.append(line)

        return teach(group, CPU, 0, from_all, say)

    problems = simulate(SimulatedTPGroup.create(size), work)
    assert all(found == problems[0] for found in problems)
    return said, problems[0]


def trials(build: Callable[..., Any], size: int) -> list[Trial]:
    return simulate(SimulatedTPGroup.create(size), lambda group: run(build, group, CPU, 0))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_lesson_agrees_and_reads_in_order(size: int) -> None:
    said, problems = taught(size)
    assert problems == []
    assert said[-2] == "All outputs and gradients are those of the unsharded layers"
    assert said[-1].startswith("Max difference: ")
    assert [line[0] for line in said if line[1:3] == ". "] == ["0", "1", "2", "3", "4"]
    assert max(map(len, said)) <= 100
    assert 50 <= len(said) <= 100
    for rank in range(size):
        assert sum(line.startswith(f"   rank {rank} ") for line in said) == 4


@pytest.mark.parametrize(
    ("build", "forward", "backward"),
    [
        # 2 x 10 positions of float32: 192 features inside, 64 outside
        (linear_pair, {"all_gather": (1, 20 * 192 * 4)}, {"all_reduce": (1, 20 * 64 * 4)}),
        (mlp_pair, {"all_reduce": (1, 20 * 64 * 4)}, {"all_reduce": (1, 20 * 64 * 4)}),
        (attention_pair, {"all_reduce": (1, 20 * 64 * 4)}, {"all_reduce": (1, 20 * 64 * 4)}),
        (
            naive_mlp_pair,
            {"all_gather": (3, 20 * (192 + 192 + 64) * 4)},
            {"all_reduce": (3, 20 * (64 + 64 + 192) * 4)},
        ),
    ],
)
def test_collectives_are_as_many_as_they_should_be(
    build: Callable[..., Any], forward: dict[str, Any], backward: dict[str, Any]
) -> None:
    for trial in trials(build, 4):
        assert trial.forward == forward
        assert trial.backward == backward
        assert max(trial.errors.values()) < 1e-6


def test_what_a_rank_holds_is_shown() -> None:
    trial = trials(mlp_pair, 4)[3]
    assert trial.rank == 3
    assert trial.shape("gate.weight") == (48, 64)
    assert trial.shape("down.weight") == (64, 48)
    assert trial.shape("-> gate") == (2, 10, 48)
    assert trial.shape("-> ") == (2, 10, 64)


def test_a_wrong_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(x: Tensor, group: SimulatedTPGroup) -> Tensor:
        return x

    monkeypatch.setattr(practice_layers, "copy_to_region", forgetful)
    said, problems = taught(2)
    assert [problem.split(" is off")[0].rpartition(": ")[2] for problem in problems] == [
        "d x",  # the MLP's
        "d x",
        "d norm.weight",
    ]
    assert "Something DIFFERS" in said
    assert any(line.startswith("   DIFFERS from the unsharded layers: off by y ") for line in said)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--processes", "3"], 2, "--processes 3 does not divide both the lesson's 16 query heads and 8"),
        (["--processes", "1"], 2, "--processes 1: a split needs at least 2 ranks; give 2, 4 or 8"),
        (["--processes", "0"], 2, "--processes 0: a split needs"),
        (["--backend", "nccl"], 1, "--backend nccl needs a GPU for each of 2 processes, and 0 can be used"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    flags: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert tensor_parallel_practice.main(flags) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {message}")


@pytest.mark.parametrize("flags", [["--processes", "two"], ["--proceses", "2"], ["--backend", "mpi"]])
def test_a_wrong_flag_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        tensor_parallel_practice.main(flags)
    assert leaving.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_differences_set_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tensor_parallel_practice, "practise", lambda options: ["an MLP: d x is off by 3.0e-01"]
    )
    assert tensor_parallel_practice.main([]) == 1
    assert capsys.readouterr().err.startswith("error: the split layers are not the unsharded ones: an MLP")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_lesson_over_real_processes(processes: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--processes", str(processes), "--backend", "gloo"],
        capture_output=True, text=True, timeout=240, env=environment(), cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"Tensor parallelism on {processes} ranks, over gloo" in done.stdout
    simulated, _ = taught(processes)
    counted = [line for line in simulated if line.startswith(("   forward", "   backward"))]
    assert [
        line for line in done.stdout.splitlines() if line.startswith(("   forward", "   backward"))
    ] == counted
