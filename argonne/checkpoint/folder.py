"""The checkpoints of a folder: find them by name, remove what is no longer needed."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from argonne.checkpoint.part_names import part_name
from argonne.files import checkpoint_step, synchronize

_OTHERS_NAME = re.compile(
    r"^(?:(?:streaming|non_streaming)_checkpoint_step_(\d+)\.pth|checkpoint_step_(\d+)\.pt)$"
)
"""Of the pipeline scripts and of the family's own trainer."""


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints in a folder as (step, path), newest step first; at equal steps ours first."""
    found = []
    parts: set[str] = set()
    for path in sorted(folder.iterdir()):
        part = part_name(path.name)
        whole = part.whole if part else path.name
        step = _step_of(whole)
        if step is not None and whole not in parts:  # of several parts the first stands for all
            found.append((step, path))
            if part:
                parts.add(whole)
    return sorted(found, key=lambda item: (-item[0], not item[1].name.startswith("tensor"), item[1].name))


def _step_of(name: str) -> int | None:
    own = checkpoint_step(name)
    match = _OTHERS_NAME.match(name)
    return int(match[1] or match[2]) if own is None and match else own


def own_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """This suite's whole checkpoints in a folder as (step, path), newest step first."""
    return [(step, path) for step, path in find_checkpoints(folder) if checkpoint_step(path.name) is not None]


def later_checkpoints(folder: Path, step: int) -> str | None:
    """A warning where checkpoints beyond ``step`` lie in the folder of a run that starts there, or None."""
    found = find_checkpoints(folder) if folder.is_dir() else []
    if not found or found[0][0] <= step:
        return None
    return (
        f"{folder} holds checkpoints up to step {found[0][0]}, and this run starts at step {step}: "
        "a later run without --checkpoint-path would resume from those; move them away"
    )


def prune(
    folder: Path,
    *,
    newest_verified: Path,
    keep: int,
    keep_every: int = 0,
    keep_steps: Collection[int] = (),
    spoiled: Collection[Path] = (),
) -> list[Path]:
    """Remove our checkpoints older than the ``keep`` newest; return what was removed.

    ``newest_verified`` is a checkpoint whose bytes were read back: unless it is there nothing is removed,
    and it and what is newer always stay. ``keep`` 0 keeps all; steps that ``keep_every`` divides, and
    ``keep_steps``, stay for good; files of the pipeline scripts are never touched. ``spoiled`` checkpoints,
    which did not verify, do not count as kept and are removed too.
    """
    verified_step = checkpoint_step(newest_verified.name)
    if keep <= 0 or verified_step is None or not newest_verified.is_file():
        return []
    own = own_checkpoints(folder)
    good = [(step, path) for step, path in own if step <= verified_step and path not in spoiled]
    kept = {path for _, path in good[:keep]}
    if keep_every:
        kept |= {path for step, path in good if step % keep_every == 0}
    kept |= {path for step, path in good if step in keep_steps}
    removed = []
    for step, path in own:
        if step >= verified_step or path in kept:
            continue
        path.unlink()
        removed.append(path)
    if removed:
        synchronize(folder)
    return removed
