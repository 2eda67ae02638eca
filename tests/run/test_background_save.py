"""Whole runs that save in the background: the same files, and every fault said in the loop."""

import signal
import time
from pathlib import Path

import pytest

from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.launch import checkpoint, launch, metrics, start, status, wait
from checkpointing import choose_checkpoint
from tests.run.whole_runs import INTERVAL, STEPS, assert_same_end, saved_steps, the_error

ASYNC = ("--async-checkpoint", "on")


@pytest.mark.slow
def test_the_same_files_and_the_same_training(tmp_path: Path, data: list[str], unbroken: Path) -> None:
    finished = launch(2, *data, *ASYNC, "--output-dir", tmp_path)
    assert finished.code == 0, finished.stderr
    assert_same_end(tmp_path, unbroken)
    assert saved_steps(tmp_path) == saved_steps(unbroken) or sorted(saved_steps(tmp_path))[-1] == STEPS
    assert "Checkpoints: in the background, from a copy in " in finished.stdout
    assert f"step_{INTERVAL}.pth" in finished.stdout and "s in the background" in finished.stdout
    assert status(tmp_path)["async_checkpoint"] and status(tmp_path)["checkpoint"].endswith(f"_{STEPS}.pth")
    held = [line["checkpoint_seconds"] for line in metrics(tmp_path)]
    assert held[INTERVAL] > 0 and held[0] == held[INTERVAL - 1] == 0.0


@pytest.mark.slow
def test_a_stop_while_a_save_is_in_flight(tmp_path: Path, data: list[str], unbroken: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        output = tmp_path / str(int(number))
        flags = [*data, *ASYNC, "--output-dir", output, "--total-steps", 400, "--checkpoint-interval", 50]
        fault = {"kind": "slow_save", "seconds": 3}
        process = start(2, *flags, fault=fault)
        while status_of(output).get("saving") is None:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        finished = wait(process)
        step = status(output)["step"]
        assert status(output)["state"] == "stopped" and step % 50 and step < 400, finished.stderr
        assert sorted(saved_steps(output)) == [50, step]
        for saved in (output / "pretrained").glob("*.pth"):
            verify_checkpoint(saved)


def status_of(output: Path) -> dict[str, object]:
    return status(output) if (output / "stats" / "run_status.json").exists() else {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["copy", "save"])
def test_a_rank_killed_in_the_copy_or_in_the_background(
    tmp_path: Path, data: list[str], unbroken: Path, victim: int, phase: str
) -> None:
    fault = {"kind": "signal", "rank": victim, "number": "SIGKILL", "phase": phase, "count": 2}
    broken = launch(2, *data, *ASYNC, "--output-dir", tmp_path, fault=fault)
    assert broken.code == 1 and f"rank {victim} died after step " in the_error(broken)
    assert status(tmp_path)["state"] == "failed"
    choice = choose_checkpoint(None, tmp_path)
    assert choice.reader is not None and choice.reader.step == INTERVAL and not choice.warnings
    assert launch(2, *data, *ASYNC, "--output-dir", tmp_path).code == 0
    assert_same_end(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_fills_up_in_the_background_is_said_in_the_loop(
    tmp_path: Path, data: list[str], victim: int
) -> None:
    """Each rank writes its half of every file; one of the later ones no longer fits."""
    fault = {"kind": "full", "rank": victim, "where": ".saving", "bytes": 13_000_000}
    flags = [*data, *ASYNC, "--output-dir", tmp_path, "--total-steps", 4000]
    finished = launch(2, *flags, fault=fault)
    line = the_error(finished)
    assert finished.code == 1 and "pretrained is full (it needs" in line and "make room" in line
    assert status(tmp_path)["state"] == "failed"
    left = sorted((tmp_path / "pretrained").iterdir())
    assert left and all(verify_checkpoint(path).path == path for path in left)  # no temporary file
    assert checkpoint(tmp_path, INTERVAL) in left


@pytest.mark.slow
def test_the_next_save_falls_due_before_the_last_has_ended(
    tmp_path: Path, data: list[str], unbroken: Path
) -> None:
    fault = {"kind": "slow_save", "seconds": 2}
    flags = [*data, *ASYNC, "--output-dir", tmp_path, "--checkpoint-interval", 3]
    finished = launch(2, *flags, fault=fault)
    assert finished.code == 0, finished.stderr
    assert_same_end(tmp_path, unbroken)
    assert max(line["checkpoint_seconds"] for line in metrics(tmp_path)) > 1.0
