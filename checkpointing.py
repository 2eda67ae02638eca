"""Checkpoints as the run sees them: choose, open on all ranks, load, save, verify, prune, export.

The order of use: ``require_safe_torch``, ``clean_temporary_files`` (rank 0), ``open_chosen`` (all ranks),
``load_slices``, then at intervals ``save_checkpoint``, where training goes on meanwhile of a ``HostCopy`` and
in a ``BackgroundSave``; ``BackgroundVerifier`` / ``prune`` (rank 0) after each save.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.checkpoint.background import BackgroundSave
from argonne.checkpoint.commit import clean_temporary_files
from argonne.checkpoint.contents import estimate_checkpoint_bytes
from argonne.checkpoint.export_hf import check_export_folder, export_hf
from argonne.checkpoint.folder import find_checkpoints, later_checkpoints, own_checkpoints, prune
from argonne.checkpoint.host_copy import HostCopy, host_copy_bytes
from argonne.checkpoint.load import LoadReport, load_slices
from argonne.checkpoint.parts import open_any
from argonne.checkpoint.pretrained_folder import is_weights_folder, open_folder, weights_of_folder
from argonne.checkpoint.reader import CheckpointReader, saved_position, weights_only
from argonne.checkpoint.room import SaveEstimate, check_room, estimate_save, require_room
from argonne.checkpoint.save import SaveReport, save_checkpoint
from argonne.checkpoint.shape import check_model_config, infer_model_config
from argonne.checkpoint.tensor_file import read_rectangle
from argonne.checkpoint.verifier import BackgroundVerifier, verify_checkpoint
from argonne.checkpoint.view import CheckpointView, agree_on_error, broadcast_object, share_checkpoint
from argonne.errors import CheckpointError, ConfigError, DeviceError
from argonne.files import OutputFolder, checkpoint_name, checkpoint_step

__all__ = [
    "BackgroundSave",
    "BackgroundVerifier",
    "CheckpointChoice",
    "CheckpointReader",
    "CheckpointView",
    "HostCopy",
    "InitialWeights",
    "LoadReport",
    "SaveEstimate",
    "SaveReport",
    "check_export_folder",
    "check_model_config",
    "check_room",
    "checkpoint_path",
    "choose_checkpoint",
    "clean_temporary_files",
    "estimate_checkpoint_bytes",
    "estimate_save",
    "export_hf",
    "find_checkpoints",
    "host_copy_bytes",
    "infer_model_config",
    "is_weights_folder",
    "later_checkpoints",
    "load_slices",
    "open_chosen",
    "open_folder",
    "open_weights",
    "own_checkpoints",
    "prune",
    "read_rectangle",
    "require_room",
    "require_safe_torch",
    "save_checkpoint",
    "saved_metadata",
    "verify_checkpoint",
    "weights_of_folder",
]

FolderConfig = Callable[[Path, str], tuple[dict[str, Any], str]]
"""Reads a folder's config.json, messages naming a flag: keyword arguments of ArgonneConfig, model_type."""

Opener = Callable[[Path], CheckpointReader]

OLDEST_TORCH = (2, 10)
FROM_SCRATCH = "NONE"


def require_safe_torch(version: str = torch.__version__) -> None:
    """Refuse versions of torch whose weights-only loader has known holes (CVE-2026-24747, before 2.10)."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        raise DeviceError(
            f"torch {version} has a known hole in loading checkpoints: install torch 2.10 or newer"
        )


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return folder / checkpoint_name(step)


def saved_metadata(path: Path) -> dict[str, Any]:
    """A checkpoint's keys beside weights and optimizer; without the position of another reader's data.

    Raises CheckpointError where it cannot be read.
    """
    reader = open_any(path)
    metadata = {key: value for key, value in reader.metadata.items() if key != "data_position"}
    position = saved_position(reader.kind, reader.metadata)
    return metadata if position is None else {**metadata, "data_position": position}


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """``--init-from``: what a run without checkpoints of its own takes its weights from."""

    path: str
    """A Hugging Face folder, or any checkpoint."""
    folder_config: FolderConfig
    flag: str = "--init-from"
    """What messages call it."""


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    """What to resume from; ``reader`` is None where the run starts from scratch."""

    reader: CheckpointReader | None
    reason: str
    """One line for the console."""
    warnings: tuple[str, ...] = ()
    """Newer checkpoints that were passed over, and why."""


def choose_checkpoint(
    requested: str | None,
    output_dir: Path,
    *,
    force_from_scratch: bool = False,
    written_before: Path | None = None,
    initial: InitialWeights | None = None,
    verify: bool = True,
) -> CheckpointChoice:
    """Choose what to start from (rank 0).

    ``requested`` is ``--checkpoint-path``: a file, a folder (the newest that verifies), ``NONE``, or None
    for the newest in ``<output_dir>/pretrained``. ``written_before`` is the newest checkpoint of an earlier
    attempt of the same launch: after a restart the run resumes from it, or from the newest before it that
    verifies, whatever was requested at first. ``initial`` is used where the output folder has no checkpoint.
    Without ``verify`` a file that opens is taken for one that verifies, and no weights are read.
    Raises CheckpointError where a named path is wrong, and where checkpoints exist but none can be loaded: a
    run never falls back to step 0 by itself.
    """
    opened_by = verify_checkpoint if verify else open_any
    folder = OutputFolder(Path(output_dir)).pretrained
    if written_before is not None and written_before.parent == folder:
        last = checkpoint_step(written_before.name) or 0
        own = [(step, path) for step, path in find_checkpoints(folder) if step <= last]
        if own:
            return _newest_that_verifies(folder, own, opened_by)
    choice = _requested_checkpoint(requested, output_dir, force_from_scratch, opened_by)
    if initial is None:
        return choice
    if choice.reader is not None:
        return replace(
            choice, reason=f"{choice.reason}; --init-from {initial.path} was used before, at step 0"
        )
    return _initial_choice(initial, opened_by)


def _initial_choice(initial: InitialWeights, opened_by: Opener = verify_checkpoint) -> CheckpointChoice:
    path = Path(initial.path).expanduser()
    if is_weights_folder(path):
        try:
            settings, model_type = initial.folder_config(path, initial.flag)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        reader = open_folder(path, settings, model_type, initial.flag)
        dtypes = sorted({str(source.dtype).removeprefix("torch.") for source in reader.model.values()})
        what = f"{path} ({model_type}, {', '.join(dtypes)})"
        warnings: tuple[str, ...] = ()
    else:
        found = _requested_checkpoint(initial.path, Path(), False, opened_by, initial.flag)
        assert found.reader is not None
        reader, warnings = weights_only(found.reader), found.warnings
        what = f"{reader.path} (its step {found.reader.step})"
    return CheckpointChoice(
        reader=reader, reason=f"starting at step 0 from the weights of {what}", warnings=warnings
    )


def reopen(view: CheckpointView) -> CheckpointReader:
    """What rank 0 opened, opened by another rank."""
    config = view.metadata.get("model_config")
    if not view.weights_only:
        return open_any(view.path)
    if is_weights_folder(view.path):
        return open_folder(view.path, config or {}, view.metadata.get("model_type", ""), "--init-from")
    return weights_only(open_any(view.path))


def _requested_checkpoint(
    requested: str | None,
    output_dir: Path,
    force_from_scratch: bool,
    opened_by: Opener,
    flag: str = "--checkpoint-path",
) -> CheckpointChoice:
    if force_from_scratch or (requested == FROM_SCRATCH and flag == "--checkpoint-path"):
        flag = "--force-from-scratch" if force_from_scratch else "--checkpoint-path NONE"
        return CheckpointChoice(reader=None, reason=f"starting from scratch ({flag})")
    if requested is None:
        folder = OutputFolder(Path(output_dir)).pretrained
        candidates = find_checkpoints(folder) if folder.is_dir() else []
        if not candidates:
            return CheckpointChoice(reader=None, reason=f"no checkpoint in {folder}: starting from scratch")
        return _newest_that_verifies(folder, candidates, opened_by)
    path, candidates = _find_requested(requested, flag)
    if candidates:
        return _newest_that_verifies(path, candidates, opened_by)
    reader = opened_by(path)
    return CheckpointChoice(reader=reader, reason=f"resuming from {path} (step {reader.step})")


def _find_requested(requested: str, flag: str = "--checkpoint-path") -> tuple[Path, list[tuple[int, Path]]]:
    """(the file that ``flag`` names, nothing) or (its folder, (step, path) of each checkpoint there).

    No checkpoint is read. Raises CheckpointError where there is none.
    """
    path = Path(requested).expanduser()
    or_none = f", or {FROM_SCRATCH}" if flag == "--checkpoint-path" else ""
    if not path.exists():
        raise CheckpointError(f"{flag} {requested} does not exist: name a file or a folder{or_none}")
    if path.is_file():
        if ".safetensors" in path.suffixes:
            raise _weights_only(path)
        return path, []
    candidates = find_checkpoints(path)
    inner = OutputFolder(path).pretrained
    if not candidates and inner.is_dir():  # it names a run's --output-dir
        path, candidates = inner, find_checkpoints(inner)
    if not candidates:
        if flag == "--checkpoint-path" and any(path.glob("*.safetensors*")):
            raise _weights_only(path)
        other = "" if flag == "--checkpoint-path" else " and no config.json with safetensors"
        raise CheckpointError(
            f"{flag} {requested} holds no checkpoint (*_checkpoint_step_N.pth, checkpoint_step_N.pt){other}"
        )
    return path, candidates


def _weights_only(path: Path) -> CheckpointError:
    return CheckpointError(
        f"--checkpoint-path {path} holds weights only (safetensors), no training state: start from them with "
        f"--init-from {path}"
    )


def _newest_that_verifies(
    folder: Path, candidates: list[tuple[int, Path]], opened_by: Opener
) -> CheckpointChoice:
    passed_over = []
    for _, path in candidates:
        try:
            if path.resolve().parent != folder.resolve():
                raise CheckpointError(f"checkpoint {path} is a link that leaves its folder")
            reader = opened_by(path)
        except CheckpointError as error:
            passed_over.append(f"passed over {error}")
            continue
        reason = f"resuming from {path} (step {reader.step})"
        return CheckpointChoice(reader=reader, reason=reason, warnings=tuple(passed_over))
    raise CheckpointError(
        f"none of the {len(candidates)} checkpoints in {folder} can be loaded ({passed_over[0]}): "
        "repair one, or start from scratch with --checkpoint-path NONE"
    )


def open_chosen(
    requested: str | None,
    output_dir: Path,
    *,
    force_from_scratch: bool,
    rank: int,
    control_group: dist.ProcessGroup | None,
    written_before: Path | None = None,
    initial: InitialWeights | None = None,
) -> tuple[CheckpointView | None, str, tuple[str, ...]]:
    """Choose on rank 0 and open on all ranks; collective.

    Returns the view (None: from scratch), the line to print and the warnings, the same on all ranks. Raises
    the same CheckpointError on all ranks.
    """
    return _open_on_all_ranks(
        lambda: choose_checkpoint(
            requested,
            output_dir,
            force_from_scratch=force_from_scratch,
            written_before=written_before,
            initial=initial,
        ),
        rank,
        control_group,
    )


def open_weights(
    initial: InitialWeights, *, rank: int, control_group: dist.ProcessGroup | None
) -> tuple[CheckpointView, tuple[str, ...]]:
    """Open what ``initial`` names on all ranks, for its weights alone; collective. Returns warnings too."""
    view, _, warnings = _open_on_all_ranks(lambda: _initial_choice(initial), rank, control_group)
    assert view is not None
    return view, warnings


def _open_on_all_ranks(
    choose: Callable[[], CheckpointChoice], rank: int, control_group: dist.ProcessGroup | None
) -> tuple[CheckpointView | None, str, tuple[str, ...]]:
    choice: CheckpointChoice | None = None
    problem: CheckpointError | None = None
    if rank == 0:
        try:
            choice = choose()
        except CheckpointError as error:
            problem = error
    agree_on_error(problem, control_group)
    told = (choice.reason, choice.warnings, choice.reader is None) if choice else None
    reason, warnings, from_scratch = broadcast_object(told, control_group)
    if from_scratch:
        return None, reason, warnings
    view = share_checkpoint(choice.reader if choice else None, rank, reopen, control_group)
    return view, reason, warnings
