"""Whole runs as they begin: finished or extended ones, a wrong launcher, an interrupt at any instant."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from argonne.files import OutputFolder
from argonne.testing.launch import Finished, checkpoint, command, environment, launch, start, status, wait
from checkpointing import own_checkpoints
from tests.run.whole_runs import STEPS

pytestmark = pytest.mark.slow


def changes(finished: Finished) -> list[str]:
    before, after = "Changed since the checkpoint: ", finished.stdout.splitlines()
    return [line.removeprefix(before) for line in after if line.startswith(before)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_finished_run_started_again_says_so_and_makes_its_export(
    tmp_path: Path, data: list[str], processes: int
) -> None:
    flags = [*data, "--output-dir", tmp_path / "run"]
    assert launch(processes, *flags).code == 0
    again = launch(processes, *flags, "--final-model-dir", tmp_path / "model")
    assert again.code == 0 and again.errors() == [] and changes(again) == []
    path = checkpoint(tmp_path / "run", STEPS)
    sentence = f"This run has already finished: {path} is at step {STEPS} of --total-steps {STEPS}; "
    assert sentence + "give a larger --total-steps to train on" in again.stdout
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert status(tmp_path / "run")["state"] == "finished"


def test_an_extended_run_says_what_it_changes(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path]
    first = launch(1, *flags, "--adam-betas", 0.9, 0.95)
    assert first.code == 0 and changes(first) == []
    extended = launch(1, *flags, "--total-steps", 2 * STEPS, "--weight-decay", 0.2, "--batch-size", 4)
    assert extended.code == 0, extended.stderr
    assert changes(extended) == [
        f"--total-steps was {STEPS}, is {2 * STEPS}",
        "--weight-decay was 0.1, is 0.2",
        "--adam-betas was 0.9 0.95, is 0.9 0.999",
    ]
    assert "the global batch (sequences a step) was 2 in the checkpoint, is 4" in extended.stderr
    assert "warning: the learning rate jumps up from 0.000434 in the checkpoint" in extended.stderr


def test_the_exports_folder_is_refused_before_the_first_step(tmp_path: Path, data: list[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused = launch(2, *data, "--output-dir", tmp_path / "run", "--final-model-dir", tmp_path / "mine")
    (line,) = refused.errors()
    assert refused.code == 1  # torchrun's, for 2
    assert line.startswith(f"error: --final-model-dir {tmp_path / 'mine'} is not empty")
    assert "Step " not in refused.stdout and status(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9, 1.2, 1.6, 2.0, 2.5, 3.0, 4.0, 6.0])
def test_an_interrupt_at_any_instant_is_one_line(tmp_path: Path, data: list[str], seconds: float) -> None:
    """During the imports, the set-up or the loop; 75 only with a checkpoint."""
    process = start(1, *data, "--output-dir", tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    finished = wait(process)
    assert "Traceback" not in finished.stderr
    saved = list((tmp_path / "pretrained").glob("*.pth"))
    if finished.code == 0:
        return  # it was quicker
    assert finished.code == (75 if saved else 128 + signal.SIGINT)
    if saved:
        assert "Stopped at step" in finished.stdout
    else:
        assert finished.stderr.splitlines()[-1].startswith("stopped by SIGINT before the first step")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "error: RANK is 'x', which is no whole number"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "error: SLURM_NTASKS is 2, but RANK"),
    ],
)
def test_a_launcher_that_starts_no_ranks(
    tmp_path: Path, data: list[str], variables: dict[str, str], line: str
) -> None:
    done = subprocess.run(
        command(1, *data, "--output-dir", tmp_path / "run"),
        env={**environment(), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def kept_files(folder: Path) -> dict[str, bytes]:
    """Every file of a run's folder but its lock and its status, which says how the last launch ended."""
    own = {OutputFolder(folder).lock, OutputFolder(folder).status}
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path not in own}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--total-tokens", 2, "--batch-size", 4], "--total-tokens"),
        (["--data-glob", "nowhere/*.parquet"], "nowhere/*.parquet"),
        (["--teacher-path", "nowhere"], "--teacher-path nowhere is no folder"),  # the last to be looked for
        (["--eval-data", "web=nowhere/*.parquet"], "nowhere/*.parquet"),
    ],
)
def test_a_refused_resume_leaves_the_folder_as_it_was(
    tmp_path: Path, data: list[str], flags: list[str], message: str
) -> None:
    usual = [*data, "--output-dir", tmp_path]
    assert launch(1, *usual).code == 0
    before = kept_files(tmp_path)
    step, earlier = own_checkpoints(OutputFolder(tmp_path).pretrained)[-1]  # one that falls due may wait
    assert step < STEPS
    refused = launch(1, *usual, "--checkpoint-path", earlier, *flags)
    (line,) = refused.errors()
    assert refused.code != 0 and message in line
    assert kept_files(tmp_path) == before
    assert launch(1, *usual, "--checkpoint-path", earlier, "--weight-decay", 0.2).code == 0
    after = kept_files(tmp_path)
    config = OutputFolder(tmp_path).run_config
    assert b"weight-decay = 0.2" in after[str(config)] and b"weight-decay = 0.2" not in before[str(config)]
