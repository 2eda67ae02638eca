"""Adam state in a checkpoint: which parameter each entry belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from argonne.checkpoint.safe_pickle import TensorRef
from argonne.checkpoint.tensor_file import Shape, TensorFile, TensorSource
from argonne.errors import CheckpointError

ADAM_KEYS = ("exp_avg", "exp_avg_sq")


def adam_of(
    file: TensorFile, state_dict: Any, names: Sequence[str], shapes: Sequence[Shape]
) -> tuple[dict[str, dict[str, TensorSource]], str, list[dict[str, Any]]]:
    """Adam state by parameter name, why it is missing, and the parameter groups' options."""
    if not isinstance(state_dict, dict) or not isinstance(state_dict.get("state"), dict):
        return {}, "the checkpoint has no optimizer state", []
    listed = state_dict.get("param_groups", ())
    if not isinstance(listed, list | tuple):
        raise CheckpointError("its optimizer has no list of parameter groups")
    groups = [dict(group) for group in listed if isinstance(group, dict)]
    for group in groups:
        indices = group.get("params", [])
        if not isinstance(indices, list | tuple) or any(type(index) is not int for index in indices):
            raise CheckpointError("a parameter group of its optimizer does not list numbers")
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    state = state_dict["state"]
    if not state:
        return {}, "the checkpoint has no optimizer state", options
    order = optimizer_order([list(group.get("params", ())) for group in groups], state, names, shapes)
    adam: dict[str, dict[str, TensorSource]] = {}
    for name, shape, index in zip(names, shapes, order, strict=True):
        entry = state.get(index)
        if not isinstance(entry, dict) or any(key not in entry for key in ("step", *ADAM_KEYS)):
            return {}, f"the optimizer state of {name} is not in the checkpoint", options
        adam[name] = _adam_entry(file, name, shape, entry)
    return adam, "", options


def _adam_entry(
    file: TensorFile, name: str, shape: Shape, entry: Mapping[str, Any]
) -> dict[str, TensorSource]:
    sources: dict[str, TensorSource] = {}
    for key in ADAM_KEYS:
        ref = entry[key]
        if not isinstance(ref, TensorRef) or ref.size != shape:
            found = ref.size if isinstance(ref, TensorRef) else type(ref).__name__
            raise CheckpointError(f"optimizer state {key} of {name} is {found}, the weight {shape}")
        sources[key] = file.source(ref)
    step = entry["step"]
    if isinstance(step, TensorRef) and step.numel == 1:
        sources["step"] = file.source(step)
    elif isinstance(step, int | float):
        sources["step"] = Scalar(float(step))
    else:
        raise CheckpointError(f"optimizer state step of {name} is not a number")
    return sources


def optimizer_order(
    groups: Sequence[Sequence[int]], state: Mapping[int, Any], names: Sequence[str], shapes: Sequence[Shape]
) -> list[int]:
    """The optimizer's index of each parameter.

    One group lists the parameters in the model's order. Two groups are taken as the usual split into
    matrices (weight decay) and vectors (none), each in the model's order; the shapes must bear it out.
    """
    indices = [index for group in groups for index in group]
    if len(indices) != len(names) or len(set(indices)) != len(indices):
        raise CheckpointError(f"its optimizer counts {len(indices)} parameters, its model {len(names)}")
    if len(groups) == 1:
        return indices

    def matrices(index: int) -> bool:
        entry = state.get(index)
        ref = entry.get("exp_avg") if isinstance(entry, dict) else None
        return isinstance(ref, TensorRef) and len(ref.size) >= 2

    wide = iter([index for index in indices if matrices(index)])
    narrow = iter([index for index in indices if not matrices(index)])
    order = [next(wide if len(shape) >= 2 else narrow, -1) for shape in shapes]
    if -1 in order:
        raise CheckpointError("its optimizer has parameter groups that do not match the model")
    return order


@dataclass(frozen=True)
class Scalar:
    """A step count that a file holds as a number instead of a tensor."""

    value: float
    shape: Shape = ()
    dtype: torch.dtype = torch.float32

    def read_into(self, out: torch.Tensor, start: Shape) -> None:
        out.fill_(self.value)
