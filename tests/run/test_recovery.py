"""Whole runs of one process with a fault in them (faulty_run.py): what they say, and how they resume."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.launch import checkpoint, environment, launch, metrics, status
from argonne.testing.launch import command as command_of
from tests.run.whole_runs import INTERVAL, STEPS, assert_same_end, saved_steps, the_error


@pytest.mark.slow
def test_skipped_steps_are_recorded_and_too_many_end_the_run(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "nan", "first": 3, "last": 4, "gradient": "blocks.1.mlp.up_proj.weight"}
    finished = launch(1, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 0 and finished.stderr.count("a step was skipped") == 2, finished.stderr
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4]
    assert all(line["data_position"]["file_name"] for line in lines)
    fault = {"kind": "nan", "first": 2, "last": 99}
    finished = launch(1, *data, "--force-from-scratch", "--output-dir", tmp_path, fault=fault)
    assert finished.code == 1 and "too many steps in a row, up to step 11" in the_error(finished)
    assert f"holds checkpoints up to step {STEPS}, and this run starts at step 0" in finished.stderr
    stand = status(tmp_path)
    assert stand["state"] == "failed" and "too many steps in a row" in stand["reason"]
    assert [line["loss"] for line in metrics(tmp_path)][1:] == [None] * 10
    for path in (tmp_path / "pretrained").iterdir():  # saved between bad steps: the weights are good
        assert verify_checkpoint(path).step <= 12


@pytest.mark.slow
def test_a_save_that_falls_due_while_the_last_is_read_back_waits(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path, "--total-steps", 100, "--keep-checkpoints", 50]
    finished = launch(1, *flags, fault={"kind": "slow", "seconds": 1.0})
    assert finished.code == 0, finished.stderr
    first, count = [line for line in finished.stderr.splitlines() if "still being verified" in line]
    assert "(step 8)" in first and " times: " in count  # said once, and counted at the end
    steps = sorted(saved_steps(tmp_path))
    assert steps[0] == INTERVAL and steps[-1] == 100 and 3 <= len(steps) < 100 // INTERVAL
    assert any(step % INTERVAL for step in steps)  # the next boundary after the reading


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, data: list[str], plain: Path) -> None:
    finished = launch(1, *data, "--output-dir", tmp_path, fault={"kind": "clock"})
    assert finished.code == 0, finished.stderr
    assert all(0.0 < line["step_seconds"] < 60.0 for line in metrics(tmp_path))
    assert_same_end(tmp_path, plain)
    again = launch(1, *data, "--output-dir", tmp_path, "--total-steps", STEPS + 1, fault={"kind": "clock"})
    assert again.code == 0 and f"(step {STEPS})" in again.stdout


def test_a_damaged_newest_checkpoint_costs_its_steps_only(
    tmp_path: Path, data: list[str], plain: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(plain, output)
    path = checkpoint(output, STEPS)
    # A save is left out while the one before is still being verified, as on a busy machine.
    before = max(step for step in range(INTERVAL, STEPS, INTERVAL) if checkpoint(output, step).exists())
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 2]))
    named = launch(1, *data, "--output-dir", output, "--checkpoint-path", path)
    assert named.code == 1 and "does not match its checksum" in the_error(named)
    again = launch(1, *data, "--output-dir", output)
    assert again.code == 0 and f"(step {before})" in again.stdout, again.stderr
    assert f"warning: passed over checkpoint {path}" in again.stderr
    assert_same_end(output, plain)
    for saved in (output / "pretrained").iterdir():
        saved.write_bytes(saved.read_bytes()[:-1])
    lost = launch(1, *data, "--output-dir", output)
    assert lost.code == 1 and "none of the 3 checkpoints in" in the_error(lost)
    assert "Step" not in lost.stdout and status(output)["state"] == "failed"


def test_a_run_whose_stdout_is_closed_trains_on(tmp_path: Path, data: list[str]) -> None:
    flags = command_of(1, *data, "--log-interval", 1, "--output-dir", tmp_path)
    ended = subprocess.run(
        ["bash", "-c", 'exec "$@" >&-', "bash", *flags], env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert len(metrics(tmp_path)) == STEPS and status(tmp_path)["state"] == "finished"
