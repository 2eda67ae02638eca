"""The checkpoints of a folder: those ahead of a start, and which are pruned."""

import shutil
from pathlib import Path

from argonne.testing.checkpoint_samples import save_sample
from checkpointing import (
    checkpoint_path,
    find_checkpoints,
    later_checkpoints,
    own_checkpoints,
    prune,
)
from tests import FIXTURES


def test_checkpoints_ahead_of_the_start_are_warned_of(tmp_path: Path) -> None:
    for step in (9, 11):
        checkpoint_path(tmp_path, step).touch()
    assert later_checkpoints(tmp_path, 11) is None and later_checkpoints(tmp_path / "none", 0) is None
    assert "up to step 11, and this run starts at step 9" in str(later_checkpoints(tmp_path, 9))


def test_checkpoints_are_found_by_name_newest_step_first(tmp_path: Path) -> None:
    names = [
        "tensor_parallel_checkpoint_step_10.pth",
        "streaming_checkpoint_step_10.pth",
        "streaming_checkpoint_step_9_stage_0_of_2.pth",
        "non_streaming_checkpoint_step_8.pth",
    ]
    others = [
        "streaming_checkpoint_step_9_stage_1_of_2.pth",
        ".tensor_parallel_checkpoint_step_12.pth.h.1.saving",
        "tensor_parallel_checkpoint_step_x.pth",
        "notes.txt",
    ]
    for name in sorted((*names, *others)):
        (tmp_path / name).touch()
    found = find_checkpoints(tmp_path)
    assert [path.name for _, path in found] == names and [step for step, _ in found] == [10, 10, 9, 8]
    assert own_checkpoints(tmp_path) == [(10, tmp_path / names[0])]


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


def test_prune_keeps_the_ends_of_stages(tmp_path: Path) -> None:
    for step in range(1, 9):
        save_sample(tmp_path, step)
    prune(tmp_path, newest_verified=checkpoint_path(tmp_path, 8), keep=1, keep_steps=(2, 5, 8, 11))
    assert _steps(tmp_path) == [2, 5, 8]


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
