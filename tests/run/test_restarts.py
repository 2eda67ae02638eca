"""Whole runs of two ranks under a real torchrun: signals in each phase, restarts, ranks that disagree."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.launch import checkpoint, launch, metrics, start, status, wait
from tests.run.whole_runs import INTERVAL, RESTARTS, STEPS, assert_same_end, the_error


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("phase", ["step", "save", "sample"])
def test_a_signal_in_any_phase_stops_saves_and_goes_on(
    tmp_path: Path, data: list[str], unbroken: Path, number: str, phase: str
) -> None:
    flags = [*data, "--sample-interval", 3, "--output-dir", tmp_path]
    fault = {"kind": "signal", "rank": 1, "number": number, "phase": phase, "step": 6}
    stopped = launch(2, *flags, fault=fault)
    assert stopped.errors() == [], stopped.stderr
    stand = status(tmp_path)
    assert stand["state"] == "stopped" and stand["reason"] == f"{number} to rank 1"
    assert "exitcode  : 75" in stopped.stderr and 0 < stand["step"] < STEPS
    assert stand["checkpoint"] == str(checkpoint(tmp_path, stand["step"]))
    assert launch(2, *flags).code == 0
    assert_same_end(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("begin", [["--force-from-scratch"], ["--checkpoint-path", "NONE"], ["first"]])
def test_a_restart_goes_on_from_the_launchs_last_save_whatever_it_began_with(
    tmp_path: Path, data: list[str], unbroken: Path, begin: list[str]
) -> None:
    if begin == ["first"]:
        begin = ["--checkpoint-path", str(checkpoint(unbroken, INTERVAL))]
        (tmp_path / "stats").mkdir()
        shutil.copy(unbroken / "stats" / "training_metrics.jsonl", tmp_path / "stats")
    fault = {"kind": "exit", "rank": 1, "step": 11, "attempt": 0}
    finished = wait(start(2, *data, *begin, "--output-dir", tmp_path, torchrun=RESTARTS, fault=fault))
    assert finished.code == 0, finished.stderr
    assert "rank 1 died after step 10" in the_error(finished)
    assert f"step_8.pth (step {8})" in finished.stdout  # the second start
    assert status(tmp_path)["restart_count"] == 1
    assert_same_end(tmp_path, unbroken)


@pytest.mark.slow
def test_too_many_steps_that_are_not_finite_are_not_trained_again(tmp_path: Path, data: list[str]) -> None:
    """The restart would go on from the last save with the same tokens."""
    fault = {"kind": "nan", "rank": 1, "first": 6, "last": 99}
    flags = [*data, "--output-dir", tmp_path, "--total-steps", 60]
    finished = wait(start(2, *flags, torchrun=RESTARTS, fault=fault))
    first, again = finished.errors()
    assert finished.code == 1 and "not finite in too many steps in a row, up to step 15" in first
    assert "a restart would end the same way" in again and "too many steps in a row" in again
    stand = status(tmp_path)
    assert (stand["state"], stand["final"], stand["restart_count"]) == ("failed", True, 0)
    assert len(metrics(tmp_path)) == 15
    for path in (tmp_path / "pretrained").iterdir():
        assert verify_checkpoint(path).step in (4, 8, 12)


@pytest.mark.slow
def test_a_stop_before_the_first_step_is_not_restarted(tmp_path: Path, data: list[str]) -> None:
    process = start(2, *data, "--output-dir", tmp_path, torchrun=RESTARTS)
    while not (tmp_path / "stats" / "run_status.json").exists():
        time.sleep(0.01)
    os.kill(status(tmp_path)["pid"], signal.SIGTERM)
    finished = wait(process)
    stand = status(tmp_path)
    if stand["step"] is None:  # it came in time
        assert stand["state"] == "stopped" and stand["restart_count"] == 0
        assert finished.code == 0 and finished.errors() == [], finished.stderr


@pytest.mark.slow
def test_a_save_longer_than_torchruns_patience_is_said_at_the_start(tmp_path: Path, data: list[str]) -> None:
    (tmp_path / "stats").mkdir()
    measured = {"checkpoint_bytes": 1_000_000, "checkpoint_seconds": 10.0, "step_seconds": 1.0}
    path = tmp_path / "stats" / "current_training_stats_tensor_parallel_step_99.json"
    path.write_text(json.dumps(measured))
    flags = [*data, "--output-dir", tmp_path, "--total-steps", 6]
    short = launch(2, *flags)
    assert short.code == 0, short.stderr
    assert "but torchrun kills its workers 30 s after a signal: start it with --shutdown-timeout 600" in (
        short.stderr
    )
    path.write_text(json.dumps(measured))
    patient = ("--standalone", "--shutdown-timeout=600")
    enough = wait(start(2, *flags, "--force-from-scratch", torchrun=patient))
    assert enough.code == 0 and "--shutdown-timeout" not in enough.stderr, enough.stderr


@pytest.mark.slow
def test_a_rank_that_dies_before_the_first_step_is_started_again(tmp_path: Path, data: list[str]) -> None:
    process = start(2, *data, "--output-dir", tmp_path, torchrun=RESTARTS)
    while not (tmp_path / "stats" / "run_status.json").exists():
        time.sleep(0.01)
    rank_0 = status(tmp_path)["pid"]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (rank_1,) = [
        int(pid)
        for pid in children
        if int(pid) != rank_0 and b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(rank_1, signal.SIGKILL)
    finished = wait(process)
    assert finished.code == 0 and "rank 1 died" in the_error(finished), finished.stderr
    stand = status(tmp_path)
    assert (stand["state"], stand["step"], stand["restart_count"]) == ("finished", STEPS, 1)


@pytest.mark.slow
def test_a_changed_copy_is_noticed(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "perturb", "rank": 1, "step": 6, "name": "blocks.1.input_norm.weight"}
    flags = [*data, "--output-dir", tmp_path, "--replica-check-interval", 5]
    finished = launch(2, *flags, fault=fault)
    line = the_error(finished)
    assert finished.code == 1 and "blocks.1.input_norm.weight is no longer the same on all ranks" in line
    assert "rank 1 differs from rank 0" in line
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["step"] == 10


@pytest.mark.slow
def test_not_finite_on_one_rank_is_skipped_on_all(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "nan", "rank": 1, "first": 3, "last": 4}
    finished = launch(2, *data, "--output-dir", tmp_path, "--replica-check-interval", 1, fault=fault)
    assert finished.code == 0, finished.stderr
    assert [line["step"] for line in metrics(tmp_path) if line.get("skipped")] == [3, 4]


@pytest.mark.slow
def test_a_degree_that_does_not_fit_ends_with_code_2(tmp_path: Path, data: list[str]) -> None:
    finished = launch(2, *data, "--output-dir", tmp_path, "--tensor-parallel-size", 3)
    assert "--tensor-parallel-size 3" in the_error(finished) and "exitcode  : 2" in finished.stderr
