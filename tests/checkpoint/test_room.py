"""Room on the disk for checkpoints, and the estimate of what saves cost."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.checkpoint import room
from argonne.checkpoint.contents import estimate_checkpoint_bytes
from argonne.checkpoint.room import check_room, estimate_save, require_room
from argonne.errors import CheckpointError
from argonne.files import OutputFolder
from argonne.testing.checkpoint_samples import sample_map

SIZE = estimate_checkpoint_bytes(sample_map(1))


def test_the_disk_must_have_room(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"bytes free for 4 checkpoints \(those kept and one more\)"):
        require_room(tmp_path, 1 << 62, 4)


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        ({}, 4),  # the three that are kept, and one more before the oldest goes
        ({"there": 2}, 2),
        ({"there": 9}, 1),  # the next save still comes before any pruning
        ({"keep": 0}, 1),
        ({"total_steps": 20}, 2),
        ({"total_steps": 25}, 3),  # the last step is saved although it is no multiple
        ({"first_step": 995}, 1),
        ({"first_step": 1000}, 0),
    ],
)
def test_room_for_the_checkpoints_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: dict[str, int], count: int
) -> None:
    settings: dict[str, Any] = {
        "there": 0, "interval": 10, "keep": 3, "first_step": 0, "total_steps": 1000, **plan,
    }  # fmt: skip

    def check(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        check_room(sample_map(1), tmp_path, **settings)

    check(count * SIZE)
    if count:
        with pytest.raises(CheckpointError, match=f"needs {count * SIZE:,} bytes free"):
            check(count * SIZE - 1)


@pytest.fixture
def output(tmp_path: Path) -> OutputFolder:
    folder = OutputFolder(tmp_path)
    folder.pretrained.mkdir()
    folder.stats.mkdir()
    return folder


def _no_trial(_: Path) -> float:
    raise AssertionError("measured figures are there")


def test_the_estimate_goes_by_the_newest_measured_save(
    output: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_trial_rate", _no_trial)
    old = {"checkpoint_bytes": 1, "checkpoint_seconds": 1.0, "step_seconds": 1.0}
    new = {"checkpoint_bytes": SIZE, "checkpoint_seconds": 6.0, "step_seconds": 0.18}
    for step, document in ((900, old), (1000, new)):
        output.current_stats(step).write_text(json.dumps(document))
    estimate = estimate_save(sample_map(2), 100, output.root)
    assert estimate.size == SIZE  # whatever the layout
    assert estimate.seconds == pytest.approx(6.0)
    assert estimate.share == pytest.approx(0.25)  # 6 s of saving to 100 steps of 0.18 s


@pytest.mark.parametrize("stats", [None, "{damaged", '{"step": 3}', '{"checkpoint_bytes": 9}'])
def test_without_a_measured_save_a_trial_write_gives_the_rate(
    output: OutputFolder, monkeypatch: pytest.MonkeyPatch, stats: str | None
) -> None:
    asked: list[Path] = []

    def trial(folder: Path) -> float:
        asked.append(folder)
        return SIZE / 2.0

    monkeypatch.setattr(room, "_trial_rate", trial)
    if stats is not None:
        output.current_stats(3).write_text(stats)
    estimate = estimate_save(sample_map(1), 100, output.root)
    assert asked == [output.pretrained]
    assert estimate.seconds == pytest.approx(2.0) and estimate.share is None


def test_the_trial_leaves_nothing_and_failing_assumes_a_rate(output: OutputFolder) -> None:
    assert estimate_save(sample_map(1), 100, output.root).seconds > 0
    assert list(output.pretrained.iterdir()) == []
    output.pretrained.rmdir()
    assert estimate_save(sample_map(1), 100, output.root).seconds == pytest.approx(SIZE / room._ASSUMED_RATE)
