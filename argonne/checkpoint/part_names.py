"""Which part of a checkpoint a file is, by its name or its keys.

- A pipeline stage: ``<name>_stage_K_of_N.pth`` (also ``-stage-K``, without ``_of_N``, or before ``_step_``),
  or the keys ``pipeline_stage`` (or ``stage``) and ``num_stages``.
- One rank's slices: ``<name>_rank_K_of_N.pth`` (also ``_tp_rank_K``), or the keys ``tp_rank`` (or
  ``tensor_parallel_rank``) and ``tp_size`` (or ``tensor_parallel_size``).

All parts lie in one folder and differ in nothing else of their names. K counts from 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from argonne.checkpoint.tensor_file import TensorFile
from argonne.errors import CheckpointError

_PART = re.compile(r"[._-](stage|(?:tp[_-]?)?rank)[_-]?(\d+)(?:[_-]of[_-]?(\d+))?(?=[._-])")
_STAGE_KEYS = (("pipeline_stage", "stage"), ("num_stages", "pipeline_stages"))
_RANK_KEYS = (("tp_rank", "tensor_parallel_rank"), ("tp_size", "tensor_parallel_size"))

PART_KEYS = frozenset(key for keys in (*_STAGE_KEYS, *_RANK_KEYS) for key in keys)
"""The keys of a file that speak of its part."""


@dataclass(frozen=True, kw_only=True)
class PartName:
    """What a file name says about a part."""

    whole: str
    """The name without the part."""
    kind: str
    """"stage" or "rank"."""
    index: int
    count: int | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One open file of several."""

    file: TensorFile
    kind: str
    index: int
    count: int | None

    @property
    def label(self) -> str:
        return f"{self.kind} {self.index} ({self.file.path.name})"


def part_name(name: str) -> PartName | None:
    """The part that a file name names, or None for a whole checkpoint's name."""
    match = _PART.search(name)
    if match is None:
        return None
    return PartName(
        whole=name[: match.start()] + name[match.end() :],
        kind="stage" if match[1] == "stage" else "rank",
        index=int(match[2]),
        count=int(match[3]) if match[3] else None,
    )


def siblings(path: Path, named: PartName) -> list[Path]:
    """The parts of the same checkpoint beside ``path``, by index. Links out of the folder are refused."""
    found = []
    folder = path.parent.resolve() if path.parent != Path() else Path.cwd()
    for child in path.parent.iterdir():
        other = part_name(child.name)
        if other is not None and (other.whole, other.kind) == (named.whole, named.kind):
            if child.resolve().parent != folder:
                raise CheckpointError(f"part {child.name} is a link that leaves its folder")
            found.append((other.index, child))
    return [child for _, child in sorted(found)]


def part_by_keys(file: TensorFile) -> Part | None:
    """The part that a file's keys name, or None where they name none."""
    tree = file.tree if isinstance(file.tree, dict) else {}
    for kind, (index_keys, count_keys) in (("stage", _STAGE_KEYS), ("rank", _RANK_KEYS)):
        index = next((tree[key] for key in index_keys if type(tree.get(key)) is int), None)
        if index is not None:
            count = next((tree[key] for key in count_keys if type(tree.get(key)) is int), None)
            return Part(file=file, kind=kind, index=index, count=count)
    return None


def part_of(file: TensorFile) -> Part:
    """The part that a file is; CheckpointError where nothing says so, or name and keys disagree."""
    if not isinstance(file.tree, dict):
        raise CheckpointError(f"{file.path.name} is not a training checkpoint")
    by_keys, by_name = part_by_keys(file), part_name(file.path.name)
    if by_keys is None and by_name is None:
        raise CheckpointError(f"{file.path.name} does not say which part of the model it is")
    if by_keys is None:
        assert by_name is not None
        return Part(file=file, kind=by_name.kind, index=by_name.index, count=by_name.count)
    if by_name is not None and (by_name.kind, by_name.index) != (by_keys.kind, by_keys.index):
        raise CheckpointError(
            f"{file.path.name} is {by_name.kind} {by_name.index} by its name and {by_keys.kind} "
            f"{by_keys.index} by its keys"
        )
    count = by_keys.count
    if count is None and by_name is not None:
        count = by_name.count
    return Part(file=file, kind=by_keys.kind, index=by_keys.index, count=count)
