"""Checkpoints as the run sees them: choose, open on all ranks, load, save, prune.

The order of use: ``require_safe_torch``, ``clean_temporary_files`` (rank 0), ``open_chosen`` (all ranks),
``load_slices``, then ``save_checkpoint`` at intervals and ``BackgroundVerifier`` / ``prune`` (rank 0) after
each save.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from argonne.checkpoint.commit import TEMPORARY_SUFFIX
from argonne.checkpoint.contents import estimate_checkpoint_bytes
from argonne.checkpoint.export_hf import export_hf
from argonne.checkpoint.load import (
    CheckpointView,
    LoadReport,
    agree_on_error,
    broadcast_object,
    load_slices,
    share_checkpoint,
)
from argonne.checkpoint.parts import open_any, part_name
from argonne.checkpoint.reader import CheckpointReader
from argonne.checkpoint.room import SaveEstimate, check_room, estimate_save, require_room
from argonne.checkpoint.save import SaveReport, save_checkpoint
from argonne.checkpoint.shape import check_model_config, infer_model_config
from argonne.checkpoint.verifier import BackgroundVerifier, verify_checkpoint
from argonne.errors import CheckpointError, DeviceError
from argonne.files import synchronize

__all__ = [
    "BackgroundVerifier",
    "CheckpointChoice",
    "CheckpointView",
    "LoadReport",
    "SaveEstimate",
    "SaveReport",
    "check_model_config",
    "check_room",
    "checkpoint_path",
    "choose_checkpoint",
    "clean_temporary_files",
    "estimate_checkpoint_bytes",
    "estimate_save",
    "export_hf",
    "infer_model_config",
    "later_checkpoints",
    "load_slices",
    "open_chosen",
    "own_checkpoints",
    "prune",
    "require_room",
    "require_safe_torch",
    "save_checkpoint",
    "verify_checkpoint",
]

OLDEST_TORCH = (2, 10)
FROM_SCRATCH = "NONE"
_NAME = re.compile(
    r"^(?:tensor_parallel_checkpoint|streaming_checkpoint|non_streaming_checkpoint)_step_(\d+)\.pth$"
)
_OWN_NAME = re.compile(r"^tensor_parallel_checkpoint_step_(\d+)\.pth$")


def require_safe_torch(version: str = torch.__version__) -> None:
    """Refuse versions of torch whose weights-only loader has known holes (CVE-2026-24747, before 2.10)."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        raise DeviceError(
            f"torch {version} has a known hole in loading checkpoints: install torch 2.10 or newer"
        )


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return folder / f"tensor_parallel_checkpoint_step_{step}.pth"


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    """What to resume from; ``reader`` is None for a start from scratch."""

    reader: CheckpointReader | None
    reason: str
    """One line for the console."""
    warnings: tuple[str, ...] = ()
    """Newer checkpoints that were passed over, and why."""


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints in a folder as (step, path), newest step first; at equal steps ours before a pipeline's."""
    found = []
    parts: set[str] = set()
    for path in sorted(folder.iterdir()):
        part = part_name(path.name)
        whole = part.whole if part else path.name
        match = _NAME.match(whole)
        if match and whole not in parts:  # of several parts the first stands for all
            found.append((int(match[1]), path))
            if part:
                parts.add(whole)
    return sorted(found, key=lambda item: (-item[0], not item[1].name.startswith("tensor"), item[1].name))


def own_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """This suite's whole checkpoints in a folder as (step, path), newest step first."""
    return [(step, path) for step, path in find_checkpoints(folder) if _OWN_NAME.match(path.name)]


def choose_checkpoint(
    requested: str | None,
    output_dir: Path,
    *,
    force_from_scratch: bool = False,
    written_before: Path | None = None,
) -> CheckpointChoice:
    """Choose what to resume from (rank 0).

    ``requested`` is ``--checkpoint-path``: a file, a folder (the newest that verifies), ``NONE``, or None
    for the newest in ``<output_dir>/pretrained``. ``written_before`` is the newest checkpoint of an earlier
    attempt of the same launch: after a restart the run goes on from there, or from the newest before it
    that verifies, whatever was requested at first. Raises CheckpointError where a named path is wrong, and
    where checkpoints exist but none loads: a run never falls back to step 0 by itself.
    """
    folder = Path(output_dir) / "pretrained"
    if written_before is not None and written_before.parent == folder:
        last = int(match[1]) if (match := _OWN_NAME.match(written_before.name)) else 0
        own = [(step, path) for step, path in find_checkpoints(folder) if step <= last]
        if own:
            return _newest_that_verifies(folder, own)
    return _requested_checkpoint(requested, output_dir, force_from_scratch)


def later_checkpoints(folder: Path, step: int) -> str | None:
    """A warning where checkpoints beyond ``step`` lie in the folder of a run that starts there, or None."""
    found = find_checkpoints(folder) if folder.is_dir() else []
    if not found or found[0][0] <= step:
        return None
    return (
        f"{folder} holds checkpoints up to step {found[0][0]}, and this run starts at step {step}: "
        "a later run without --checkpoint-path would resume from those; move them away"
    )


def _requested_checkpoint(
    requested: str | None, output_dir: Path, force_from_scratch: bool
) -> CheckpointChoice:
    if force_from_scratch or requested == FROM_SCRATCH:
        flag = "--force-from-scratch" if force_from_scratch else "--checkpoint-path NONE"
        return CheckpointChoice(reader=None, reason=f"starting from scratch ({flag})")
    folder = Path(output_dir) / "pretrained" if requested is None else Path(requested).expanduser()
    if requested is not None and not folder.exists():
        raise CheckpointError(f"--checkpoint-path {requested} does not exist: name a file, a folder or NONE")
    if folder.is_file():
        reader = verify_checkpoint(folder)
        return CheckpointChoice(reader=reader, reason=f"resuming from {folder} (step {reader.step})")
    candidates = find_checkpoints(folder) if folder.is_dir() else []
    if not candidates and requested is not None and (folder / "pretrained").is_dir():  # a run's --output-dir
        folder = folder / "pretrained"
        candidates = find_checkpoints(folder)
    if not candidates and requested is not None:
        raise CheckpointError(f"--checkpoint-path {requested} holds no checkpoint (*_checkpoint_step_N.pth)")
    if not candidates:
        return CheckpointChoice(reader=None, reason=f"no checkpoint in {folder}: starting from scratch")
    return _newest_that_verifies(folder, candidates)


def _newest_that_verifies(folder: Path, candidates: list[tuple[int, Path]]) -> CheckpointChoice:
    passed_over = []
    for _, path in candidates:
        try:
            if path.resolve().parent != folder.resolve():
                raise CheckpointError(f"checkpoint {path} is a link that leaves its folder")
            reader = verify_checkpoint(path)
        except CheckpointError as error:
            passed_over.append(f"passed over {error}")
            continue
        reason = f"resuming from {path} (step {reader.step})"
        return CheckpointChoice(reader=reader, reason=reason, warnings=tuple(passed_over))
    raise CheckpointError(
        f"none of the {len(candidates)} checkpoints in {folder} loads ({passed_over[0]}): repair one, or "
        "start afresh with --checkpoint-path NONE"
    )


def open_chosen(
    requested: str | None,
    output_dir: Path,
    *,
    force_from_scratch: bool,
    rank: int,
    control_group: dist.ProcessGroup | None,
    written_before: Path | None = None,
) -> tuple[CheckpointView | None, str, tuple[str, ...]]:
    """Choose on rank 0 and open on all ranks; collective.

    Returns the view (None: from scratch), the line to say and the warnings, the same on all ranks. Raises
    the same CheckpointError on all.
    """
    choice: CheckpointChoice | None = None
    problem: CheckpointError | None = None
    if rank == 0:
        try:
            choice = choose_checkpoint(
                requested,
                output_dir,
                force_from_scratch=force_from_scratch,
                written_before=written_before,
            )
        except CheckpointError as error:
            problem = error
    agree_on_error(problem, control_group)
    said = (choice.reason, choice.warnings, choice.reader is None) if choice else None
    reason, warnings, from_scratch = broadcast_object(said, control_group)
    if from_scratch:
        return None, reason, warnings
    view = share_checkpoint(choice.reader if choice else None, rank, open_any, control_group)
    return view, reason, warnings


def clean_temporary_files(folder: Path) -> list[str]:
    """Remove what killed saves left in a folder; return the names. Files of a save under way are kept."""
    removed = []
    for path in sorted(folder.glob(f".*.pth.*{TEMPORARY_SUFFIX}")) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(descriptor)
    return removed


def prune(
    folder: Path,
    *,
    newest_verified: Path,
    keep: int,
    keep_every: int = 0,
    spoiled: Collection[Path] = (),
) -> list[Path]:
    """Remove our checkpoints older than the ``keep`` newest; return what was removed.

    ``newest_verified`` is a checkpoint whose bytes were read back: nothing is removed unless it is there,
    and neither it nor anything newer is. ``keep`` 0 keeps all; steps that ``keep_every`` divides stay for
    good; files of the pipeline scripts are never touched. ``spoiled`` ones, which did not verify, go too.
    """
    match = _OWN_NAME.match(newest_verified.name)
    if keep <= 0 or match is None or not newest_verified.is_file():
        return []
    verified_step = int(match[1])
    own = own_checkpoints(folder)
    good = [(step, path) for step, path in own if step <= verified_step and path not in spoiled]
    kept = {path for _, path in good[:keep]}
    if keep_every:
        kept |= {path for step, path in good if step % keep_every == 0}
    removed = []
    for step, path in own:
        if step >= verified_step or path in kept:
            continue
        path.unlink()
        removed.append(path)
    if removed:
        synchronize(folder)
    return removed
