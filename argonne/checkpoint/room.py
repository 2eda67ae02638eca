"""What checkpoints cost: room on the disk, and the time of a save."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from argonne.checkpoint.contents import estimate_checkpoint_bytes
from argonne.checkpoint.streamed_file import StreamedFile
from argonne.errors import CheckpointError
from argonne.files import OutputFolder, read_json
from argonne.tp.slices import SliceMap

_TRIAL_BYTES = 32 << 20
_ASSUMED_RATE = 1e9
"""Bytes a second, where the trial write fails."""


def require_room(folder: Path, need: int, count: int = 1) -> None:
    """CheckpointError where the disk has fewer than ``need`` bytes free, for ``count`` checkpoints."""
    free = shutil.disk_usage(folder).free
    if free < need:
        purpose = f" for {count} checkpoints (those kept and one more)" if count > 1 else ""
        raise CheckpointError(
            f"{folder} needs {need:,} bytes free{purpose} and has {free:,}: make room or lower "
            "--keep-checkpoints"
        )


def check_room(
    slice_map: SliceMap,
    folder: Path,
    *,
    there: int,
    interval: int,
    keep: int,
    first_step: int,
    total_steps: int,
) -> None:
    """CheckpointError where the disk cannot take the checkpoints that are still to come (rank 0).

    Before one is pruned, ``keep`` and one more lie in ``folder``; ``there`` are in it already. A run that
    ends sooner writes fewer. ``interval``, ``first_step`` and ``total_steps`` are optimizer steps.
    """
    saves = total_steps // interval - first_step // interval + (total_steps % interval != 0)
    count = min(max(0, saves), max(1, keep + 1 - there))
    require_room(folder, count * estimate_checkpoint_bytes(slice_map), count)


@dataclass(frozen=True, kw_only=True)
class SaveEstimate:
    """What saves will cost."""

    size: int
    """Bytes of one checkpoint."""
    seconds: float
    """Of one save."""
    share: float | None
    """Of the run's time that goes into saves, 0 to 1; None where no step has been timed yet."""


def estimate_save(slice_map: SliceMap, checkpoint_interval: int, output_dir: Path) -> SaveEstimate:
    """Estimate from what an earlier run into this folder measured, else from a small trial write (rank 0).

    ``checkpoint_interval`` is in optimizer steps.
    """
    output = OutputFolder(output_dir)
    newest = output.newest_current_stats()
    measured = (read_json(newest) if newest is not None else None) or {}
    size = estimate_checkpoint_bytes(slice_map)
    written, taken = measured.get("checkpoint_bytes"), measured.get("checkpoint_seconds")
    rate = written / taken if written and taken else _trial_rate(output.pretrained)
    seconds = size / rate
    step_seconds = measured.get("step_seconds")
    share = seconds / (seconds + checkpoint_interval * step_seconds) if step_seconds else None
    return SaveEstimate(size=size, seconds=seconds, share=share)


def _trial_rate(folder: Path) -> float:
    """Bytes a second that the disk takes; assumed where it takes none."""
    with contextlib.suppress(OSError):
        return write_rate(folder)
    return _ASSUMED_RATE


def write_rate(folder: Path) -> float:
    """Bytes a second that the disk takes, fsync included, by a trial file without a name; OSError."""
    with tempfile.TemporaryFile(dir=folder) as trial:
        started = time.monotonic()
        with StreamedFile(trial.fileno()) as file:
            file.append(bytes(_TRIAL_BYTES))
            file.finish()
        os.fsync(trial.fileno())
        return _TRIAL_BYTES / max(time.monotonic() - started, 1e-3)
