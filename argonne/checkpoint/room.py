"""Room and time for checkpoints: what the disk has, and what a save will cost."""

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
from argonne.files import read_json
from argonne.tp.slices import SliceMap


def require_room(folder: Path, need: int, count: int = 1) -> None:
    """CheckpointError where the disk has fewer than ``need`` bytes free, for ``count`` checkpoints."""
    free = shutil.disk_usage(folder).free
    if free < need:
        purpose = f" for {count} checkpoints (those kept and one more)" if count > 1 else ""
        raise CheckpointError(
            f"{folder} needs {need:,} bytes free{purpose} and has {free:,}: make room or lower "
            "--keep-checkpoints"
        )


_ASSUMED_RATE = 1e9

_TRIAL_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class SaveEstimate:
    """What saves will cost."""

    size: int
    """Bytes of one checkpoint."""
    seconds: float
    share: float | None
    """Of the run's time, 0 to 1; None where no step has been timed yet."""


def estimate_save(slice_map: SliceMap, checkpoint_interval: int, output_dir: Path) -> SaveEstimate:
    """From what an earlier run into this folder measured, else from a trial write of a few megabytes."""
    size = estimate_checkpoint_bytes(slice_map)
    measured = list((output_dir / "stats").glob("current_training_stats_tensor_parallel_step_*.json"))
    newest = max(measured, key=lambda path: int(path.stem.rpartition("_")[2]), default=None)
    stats = (read_json(newest) if newest is not None else None) or {}
    bytes_then, seconds_then = stats.get("checkpoint_bytes"), stats.get("checkpoint_seconds")
    rate = (
        bytes_then / seconds_then if bytes_then and seconds_then else _trial_rate(output_dir / "pretrained")
    )
    seconds, step_seconds = size / rate, stats.get("step_seconds")
    share = seconds / (seconds + checkpoint_interval * step_seconds) if step_seconds else None
    return SaveEstimate(size=size, seconds=seconds, share=share)


def _trial_rate(folder: Path) -> float:
    """Bytes a second that the disk takes, fsync included."""
    with contextlib.suppress(OSError):
        with tempfile.TemporaryFile(dir=folder) as trial:
            started = time.monotonic()
            with StreamedFile(trial.fileno()) as file:
                file.append(bytes(_TRIAL_BYTES))
                file.finish()
            os.fsync(trial.fileno())
            return _TRIAL_BYTES / max(time.monotonic() - started, 1e-3)
    return _ASSUMED_RATE


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
    """CheckpointError where the disk cannot take the checkpoints that are kept and one more (rank 0).

    ``interval``, ``first_step`` and ``total_steps`` are optimizer steps; ``there`` (checkpoints in the folder
    already) and ``keep`` count checkpoints.
    """
    saves = total_steps // interval - first_step // interval + (total_steps % interval != 0)
    count = min(max(0, saves), max(1, keep + 1 - there))
    require_room(folder, count * estimate_checkpoint_bytes(slice_map), count)
