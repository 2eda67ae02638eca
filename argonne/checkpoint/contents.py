"""What a checkpoint file holds: its tensors in order, its tree, its size."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from argonne.checkpoint.adam import ADAM_KEYS
from argonne.checkpoint.archive import ArchiveWriter
from argonne.checkpoint.reader import HEAD
from argonne.checkpoint.safe_pickle import TensorRef, contiguous_ref, dump_tree
from argonne.checkpoint.shape import EMBEDDING
from argonne.tp.slices import SliceMap

Adam = Mapping[str, Mapping[str, torch.Tensor]]
"""A rank's Adam state: by parameter name ``step``, ``exp_avg`` and ``exp_avg_sq``."""

_RECORD_OVERHEAD = 512
_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file: ``key`` is "param", "exp_avg" or "exp_avg_sq" of the parameter ``name``."""

    name: str
    key: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes in float32."""
        return 4 * math.prod(self.shape)

    @property
    def label(self) -> str:
        """What a message calls it."""
        return self.name if self.key == "param" else f"{self.key} of {self.name}"

    def local(self, parameters: Mapping[str, torch.Tensor], adam: Adam) -> torch.Tensor:
        """The tensor that this rank holds of it."""
        return parameters[self.name] if self.key == "param" else adam[self.name][self.key]


def estimate_checkpoint_bytes(slice_map: SliceMap, *, with_adam: bool = True) -> int:
    """An upper bound of a checkpoint file's bytes: float32 weights and Adam state, headers and padding."""
    tensors = len(slice_map.names) * (4 if with_adam else 1) + 8
    return slice_map.numel() * 4 * (3 if with_adam else 1) + tensors * _RECORD_OVERHEAD + _HEADER_BYTES


def tensor_entries(shapes: Mapping[str, tuple[int, ...]], *, with_adam: bool) -> list[TensorEntry]:
    """The tensors of a checkpoint in the order in which they lie in the file."""
    weights = [TensorEntry(name, "param", shape) for name, shape in shapes.items()]
    keys = ADAM_KEYS if with_adam else ()
    return weights + [TensorEntry(name, key, shape) for name, shape in shapes.items() for key in keys]


def build_tree(
    entries: Sequence[TensorEntry],
    param_group: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    tied: bool,
    weight_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The dictionary that ``torch.load`` will return, with references where the tensors will lie.

    Entry number i lies in record ``data/i``, the step count of parameter j in ``data/step_j``.
    """
    refs = {
        (entry.name, entry.key): contiguous_ref(
            str(index), weight_dtype if entry.key == "param" else torch.float32, entry.shape
        )
        for index, entry in enumerate(entries)
    }
    names = [entry.name for entry in entries if entry.key == "param"]
    weights = {name: refs[name, "param"] for name in names}
    if tied:
        weights[HEAD] = replace(weights[EMBEDDING])  # a second tensor on the same bytes
    state: dict[int, dict[str, TensorRef]] = {}
    for index, name in enumerate(names if len(refs) > len(names) else ()):
        step = contiguous_ref(f"step_{index}", torch.float32, ())
        state[index] = {"step": step, **{key: refs[name, key] for key in ADAM_KEYS}}
    tree = dict(metadata)
    tree.setdefault("scheduler_state_dict", {"step": int(metadata["global_step"]) - 1})
    tree["model_state_dict"] = weights
    tree["optimizer_state_dict"] = {"state": state, "param_groups": [_full_group(param_group, len(names))]}
    return tree


def _full_group(options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """AdamW's parameter group with every key that this torch writes.

    Read off its signature: to build an optimizer would import torch's compiler, which takes seconds.
    """
    signature = inspect.signature(torch.optim.AdamW.__init__).parameters
    group = {name: signature[name].default for name in signature if name not in ("self", "params")}
    group["decoupled_weight_decay"] = True
    group.update({key: value for key, value in options.items() if key != "params"})
    group["params"] = list(range(count))
    return group


def first_records(tree: bytes) -> list[tuple[str, bytes]]:
    """Names and bytes of the records that torch expects before the tensors; ``tree``: the pickled tree."""
    fixed = [(".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")]
    return [("data.pkl", tree), *fixed]


def last_records(steps: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """Names and bytes of the records behind the tensors: Adam's step counts, then what torch expects."""
    counts = [(f"data/step_{index}", step) for index, step in enumerate(steps)]
    return [*counts, ("version", b"3\n"), (".data/serialization_id", b"0" * 40)]


def begin_archive(writer: ArchiveWriter, tree: dict[str, Any]) -> None:
    """Write the records that torch expects before the tensors."""
    for name, data in first_records(dump_tree(tree)):
        writer.add(name, data)


def finish_archive(writer: ArchiveWriter) -> int:
    """Write the records that torch expects after the tensors, and the directory; return the file's bytes."""
    for name, data in last_records([]):
        writer.add(name, data)
    return writer.close()
