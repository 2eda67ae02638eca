"""Whole runs on disks that are full, fail, refuse or spoil what is written."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.launch import checkpoint, launch, start, status, wait
from tests.run.whole_runs import INTERVAL, STEPS, saved_steps, the_error


def test_a_disk_that_fills_up_ends_the_run_with_its_last_save_named(tmp_path: Path, data: list[str]) -> None:
    size = 1_000_000
    finished = launch(
        1, *data, "--output-dir", tmp_path, fault={"kind": "full", "where": ".saving", "bytes": size}
    )
    line = the_error(finished)
    assert finished.code == 1 and "pretrained is full (it needs" in line and "make room" in line
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["step"] == INTERVAL
    assert list((tmp_path / "pretrained").iterdir()) == []
    fault = {"kind": "full", "where": "training_metrics", "bytes": 600}
    finished = launch(1, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 0 and "training goes on" in finished.stderr
    assert verify_checkpoint(checkpoint(tmp_path, STEPS)).step == STEPS


@pytest.mark.slow
def test_a_last_save_that_the_disk_spoils_is_written_again(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", STEPS]
    finished = launch(1, *flags, fault={"kind": "spoil", "times": 1})
    assert finished.code == 0 and "does not match its checksum" in finished.stderr
    assert verify_checkpoint(checkpoint(tmp_path, STEPS)).step == STEPS
    finished = launch(1, *flags, "--force-from-scratch", fault={"kind": "spoil", "times": 9})
    assert finished.code == 1 and "does not match its checksum" in the_error(finished)
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["checkpoint"] is None


def test_a_checkpoint_that_the_disk_spoils_is_followed_by_another_at_once(
    tmp_path: Path, data: list[str]
) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", 40, "--total-steps", 80]
    finished = launch(1, *flags, fault={"kind": "spoil", "times": 1})
    assert finished.code == 0, finished.stderr
    (warning,) = [line for line in finished.stderr.splitlines() if line.startswith("warning: ")]
    assert "step_40.pth" in warning and warning.endswith("and another is saved at once")
    first, last = sorted(saved_steps(tmp_path))  # the spoiled one went when its successor had verified
    assert 40 < first < 80 and last == 80
    assert verify_checkpoint(checkpoint(tmp_path, first)).step == first


@pytest.mark.slow
def test_a_disk_that_spoils_every_checkpoint_does_not_save_at_every_step(
    tmp_path: Path, data: list[str]
) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", 40, "--total-steps", 120]
    finished = launch(1, *flags, fault={"kind": "spoil", "times": 99})
    assert finished.code == 1 and "does not match its checksum" in the_error(finished)
    assert finished.stderr.count("another is saved at once") == 2
    assert finished.stderr.count("check this disk") == 2
    steps = sorted(saved_steps(tmp_path))
    assert len(steps) == 5 and {40, 80, 120} < set(steps) and steps[2] < 80
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["checkpoint"] is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 64 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_really_full_disk(small_disk: Path, data: list[str]) -> None:
    refused = launch(
        1, *data, "--checkpoint-interval", 1, "--keep-checkpoints", 9, "--output-dir", small_disk
    )
    line = the_error(refused)
    assert refused.code == 1 and "bytes free for 10 checkpoints (those kept and one more) and has" in line
    process = start(2, *data, "--output-dir", small_disk, "--total-steps", 5000)
    while not checkpoint(small_disk, INTERVAL).exists():
        time.sleep(0.02)
        assert process.poll() is None
    with (small_disk / "filler").open("wb") as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    finished = wait(process)
    line = the_error(finished)
    assert finished.code == 1 and ("is full" in line or "bytes free" in line), line
    names = [path.name for path in (small_disk / "pretrained").iterdir()]
    assert names and not any(name.startswith(".") for name in names)
    for name in names:
        verify_checkpoint(small_disk / "pretrained" / name)
    (small_disk / "filler").unlink()
    last = max(int(name.rpartition("_")[2].removesuffix(".pth")) for name in names)
    again = launch(2, *data, "--output-dir", small_disk, "--total-steps", last + 2)
    assert again.code == 0 and f"(step {last})" in again.stdout, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "text", "victim"), [("EROFS", "Read-only file system", 0), ("EIO", "Input/output error", 1)]
)
def test_a_disk_that_fails_in_a_save(
    tmp_path: Path, data: list[str], error: str, text: str, victim: int
) -> None:
    """Each rank writes its half of every file; that of the second no longer passes."""
    fault = {"kind": "full", "rank": victim, "where": ".saving", "bytes": 7_500_000, "error": error}
    finished = launch(2, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 1 and f"could not be written: {text}" in the_error(finished)
    assert status(tmp_path)["state"] == "failed"
    assert [path.name for path in (tmp_path / "pretrained").iterdir()] == [
        checkpoint(tmp_path, INTERVAL).name
    ]
    verify_checkpoint(checkpoint(tmp_path, INTERVAL))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_built(
    small_disk: Path, data: list[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    finished = launch(2, *data, "--output-dir", small_disk / "run")
    line = the_error(finished)
    assert finished.code == 1 and "cannot be made or written (Read-only file system)" in line
    assert "Model:" not in finished.stdout
