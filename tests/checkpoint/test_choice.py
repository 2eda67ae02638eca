"""Which checkpoint a run resumes from, and which it removes."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from argonne.checkpoint.verifier import BackgroundVerifier
from argonne.errors import CheckpointError, DeviceError
from argonne.testing.checkpoint_samples import save_sample
from checkpointing import (
    checkpoint_path,
    choose_checkpoint,
    later_checkpoints,
    prune,
    require_room,
    require_safe_torch,
)
from tests import FIXTURES


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """An output folder whose newest checkpoint by step (11) is not its newest by time."""
    folder = tmp_path / "out" / "pretrained"
    for step in (9, 11, 10):
        save_sample(folder, step)
    for age, step in enumerate((11, 10, 9)):
        os.utime(checkpoint_path(folder, step), (1e9 - age, 1e9 - age))
    return tmp_path / "out"


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_the_newest_step_is_taken_whatever_the_clock_says(output_dir: Path) -> None:
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and choice.reader.step == 11 and choice.warnings == ()
    assert choice.reason.startswith("resuming from") and "(step 11)" in choice.reason


def test_a_damaged_newest_is_passed_over_with_the_reason(output_dir: Path) -> None:
    _damage(checkpoint_path(output_dir / "pretrained", 11))
    checkpoint_path(output_dir / "pretrained", 12).write_bytes(b"")
    for requested in (None, str(output_dir / "pretrained"), str(output_dir)):
        choice = choose_checkpoint(requested, output_dir)
        assert choice.reader is not None and choice.reader.step == 10
        empty, flipped = choice.warnings
        assert "step_12.pth: the file is empty (0 bytes)" in empty
        assert "step_11.pth: record archive/data/" in flipped and "does not match its checksum" in flipped


def test_a_named_damaged_file_is_an_error(output_dir: Path) -> None:
    path = checkpoint_path(output_dir / "pretrained", 11)
    _damage(path)
    with pytest.raises(CheckpointError, match=r"does not match its checksum"):
        choose_checkpoint(str(path), output_dir)


def test_when_none_loads_it_is_an_error_and_never_step_0(output_dir: Path) -> None:
    for step in (9, 10, 11):
        _damage(checkpoint_path(output_dir / "pretrained", step))
    for requested in (None, str(output_dir / "pretrained"), str(output_dir)):
        with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* can be loaded"):
            choose_checkpoint(requested, output_dir)


def test_a_restart_goes_on_from_the_newest_that_its_launch_wrote(output_dir: Path) -> None:
    folder = output_dir / "pretrained"
    for first in ({"requested": "NONE"}, {"requested": str(checkpoint_path(folder, 9))}):
        choice = choose_checkpoint(
            first["requested"], output_dir, written_before=checkpoint_path(folder, 10)
        )  # 11 is another run's
        assert choice.reader is not None and choice.reader.step == 10
    _damage(checkpoint_path(folder, 10))
    choice = choose_checkpoint(
        None, output_dir, force_from_scratch=True, written_before=checkpoint_path(folder, 10)
    )
    assert choice.reader is not None and choice.reader.step == 9 and "step_10.pth" in choice.warnings[0]
    elsewhere = choose_checkpoint("NONE", output_dir, written_before=output_dir / "other" / "x.pth")
    assert elsewhere.reader is None


def test_checkpoints_ahead_of_the_start_are_warned_of(output_dir: Path, tmp_path: Path) -> None:
    folder = output_dir / "pretrained"
    assert later_checkpoints(folder, 11) is None and later_checkpoints(tmp_path / "none", 0) is None
    assert "up to step 11, and this run starts at step 9" in str(later_checkpoints(folder, 9))


def test_the_disk_must_have_room(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"bytes free for 4 checkpoints \(those kept and one more\)"):
        require_room(tmp_path, 1 << 62, 4)


def test_from_scratch_only_when_nothing_is_there_or_asked(output_dir: Path, tmp_path: Path) -> None:
    assert choose_checkpoint("NONE", output_dir).reader is None
    assert choose_checkpoint(None, output_dir, force_from_scratch=True).reader is None
    fresh = choose_checkpoint(None, tmp_path / "fresh")
    assert fresh.reader is None and "no checkpoint in" in fresh.reason and "from scratch" in fresh.reason


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("nowhere.pth", "nowhere.pth does not exist"),
        ("empty", "empty holds no checkpoint"),
        ("none", "does not"),
    ],
)
def test_a_wrong_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requested: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        choose_checkpoint(requested, tmp_path)


def test_pipeline_names_are_recognised_beside_ours(output_dir: Path) -> None:
    folder = output_dir / "pretrained"
    shutil.copy(FIXTURES / "streaming_checkpoint_step_25.pth", folder)
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and (choice.reader.step, choice.reader.kind) == (25, "pipeline")
    shutil.copy(
        FIXTURES / "streaming_checkpoint_step_40.pth", folder / "non_streaming_checkpoint_step_40.pth"
    )
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and choice.reader.step == 40


def test_a_link_that_leaves_the_folder_is_passed_over(output_dir: Path, tmp_path: Path) -> None:
    outside, _ = save_sample(tmp_path / "outside", 30)
    (output_dir / "pretrained" / outside.name).symlink_to(outside)
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and choice.reader.step == 11
    assert "is a link that leaves its folder" in choice.warnings[0]


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.rsplit("_", 1)[1]) for path in folder.glob("tensor_parallel*.pth"))


def test_prune_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    for step in range(1, 9):
        save_sample(tmp_path, step)
    shutil.copy(FIXTURES / "streaming_checkpoint_step_25.pth", tmp_path / "streaming_checkpoint_step_1.pth")
    removed = prune(tmp_path, newest_verified=checkpoint_path(tmp_path, 8), keep=3, keep_every=4)
    assert sorted(path.name for path in removed) == [
        f"tensor_parallel_checkpoint_step_{step}.pth" for step in (1, 2, 3, 5)
    ]
    assert _steps(tmp_path) == [4, 6, 7, 8]
    assert (tmp_path / "streaming_checkpoint_step_1.pth").exists()
    assert prune(tmp_path, newest_verified=checkpoint_path(tmp_path, 8), keep=0) == []


def test_prune_counts_no_spoiled_file_among_those_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_sample(tmp_path, step)
    spoiled = [checkpoint_path(tmp_path, step) for step in (4, 5)]
    prune(tmp_path, newest_verified=checkpoint_path(tmp_path, 6), keep=2, keep_every=4, spoiled=spoiled)
    assert _steps(tmp_path) == [3, 6]


def test_prune_removes_nothing_on_the_word_of_an_unverified_file(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_sample(tmp_path, step)
    assert prune(tmp_path, newest_verified=checkpoint_path(tmp_path, 9), keep=1) == []
    assert [
        path.name[-5] for path in prune(tmp_path, newest_verified=checkpoint_path(tmp_path, 2), keep=1)
    ] == ["1"]
    assert _steps(tmp_path) == [2, 3]


def test_a_damaged_new_file_keeps_its_predecessors(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_sample(tmp_path, step)
    verifier = BackgroundVerifier(lambda path: prune(tmp_path, newest_verified=path, keep=1))
    _damage(checkpoint_path(tmp_path, 3))
    verifier.start(checkpoint_path(tmp_path, 3))
    problem = verifier.wait()
    assert problem is not None and "step_3.pth" in str(problem)
    assert _steps(tmp_path) == [1, 2, 3] and verifier.poll() is None
    save_sample(tmp_path, 4)
    verifier.start(checkpoint_path(tmp_path, 4))
    assert verifier.wait() is None and not verifier.busy
    assert _steps(tmp_path) == [4]


def test_torch_versions_with_known_holes_are_refused() -> None:
    require_safe_torch(torch.__version__)
    for version in ("2.9.1", "2.6.0+cu124", "1.13.1", "weird"):
        with pytest.raises(DeviceError, match=r"install torch 2\.10 or newer"):
            require_safe_torch(version)
    for version in ("2.10.0", "2.13.0+cpu", "3.0"):
        require_safe_torch(version)
