"""What a sharded model carries with it: group, slice map, and the gradients that are still partial.

Also the way back, for tests and verification: unsharded tensors from the slices of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from argonne.tp.copied_gradients import CopiedGradients
from argonne.tp.group import TPGroup
from argonne.tp.plan import TensorParallelPlan
from argonne.tp.regions import SequenceState
from argonne.tp.slices import SliceMap


def take_slice(unsharded: Tensor, slice_map: SliceMap, name: str, rank: int) -> Tensor:
    """A new tensor with the local slice of ``unsharded`` that ``rank`` holds; padding is zero."""
    local = torch.zeros(slice_map.local_shape(name, rank), dtype=unsharded.dtype, device=unsharded.device)
    for box in slice_map.rectangles(name, rank):
        local[box.local_index] = unsharded[box.unsharded_index]
    return local


@dataclass(eq=False, kw_only=True)
class TensorParallelState:
    """What a sharded model carries with it, as ``model.tensor_parallel``."""

    group: TPGroup
    slice_map: SliceMap
    """Tensor-parallel cuts alone (one replica); ``SliceMap.with_data_parallel`` lays replicas over them."""
    sequence: SequenceState
    plan: TensorParallelPlan
    pad_to: int = 1
    """What local widths are padded to a multiple of."""
    summed: tuple[str, ...]
    """Replicated parameters whose gradients are partial: summed over the whole group once a step."""
    sharers: TPGroup | None
    """The ranks that hold the same key/value heads, where they all hold the same ones; else None."""
    copies: CopiedGradients | None = None
    """Where copied heads lie unevenly: who holds what of them."""

    @property
    def shared(self) -> tuple[str, ...]:
        """Parameters of which other ranks hold copies: their gradients are summed over those ranks."""
        return self.slice_map.copied

    def sum_partial_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Complete, in place, the gradients of replicated parameters; once per optimizer step.

        ``gradients`` are local plain tensors by parameter name. One bucket, and one more over the ranks
        that share key/value heads.
        """
        _reduce_bucket([gradients[name] for name in self.summed if name in gradients], self.group)
        if self.sharers is not None:
            _reduce_bucket([gradients[name] for name in self.shared if name in gradients], self.sharers)
        if self.copies is not None:
            self.copies.sum(gradients)


def _reduce_bucket(gradients: list[Tensor], group: TPGroup) -> None:
    if not gradients or group.size == 1:
        return
    bucket = torch.cat(
        [
            gradient.reshape(-1).float() if gradient.dtype != torch.float64 else gradient.reshape(-1)
            for gradient in gradients
        ]
    )
    bucket = group.all_reduce(bucket, owned=True)
    for gradient, part in zip(gradients, bucket.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gather_unsharded(local: Tensor, name: str, state: TensorParallelState) -> Tensor:
    """The unsharded tensor of parameter ``name``, from its slices on all ranks; collective over the group."""
    group, slice_map = state.group, state.slice_map
    parts = group.all_gather(_padded(local, name, slice_map)[None]) if group.size > 1 else local[None]
    whole = torch.full(slice_map.shape(name), math.nan, dtype=local.dtype, device=local.device)
    for rank in range(group.size):
        for box in slice_map.owned(name, rank):
            whole[box.unsharded_index] = parts[rank][box.local_index]
    return whole


def _padded(local: Tensor, name: str, slice_map: SliceMap) -> Tensor:
    """``local`` with zeros up to the largest slice of any rank: a gather takes equal shapes."""
    cut = slice_map.cut(name)
    missing = 0 if cut is None else max(cut.local_sizes) - local.shape[cut.dimension]
    if cut is None or not missing:
        return local.contiguous()
    shape = (*local.shape[: cut.dimension], missing, *local.shape[cut.dimension + 1 :])
    return torch.cat([local, local.new_zeros(shape)], dim=cut.dimension)


def gather_state_dict(model: nn.Module, *, gradients: bool = False) -> dict[str, Tensor]:
    """The unsharded parameters (or gradients) of a sharded model, on every rank: for tests and checks.

    Collective over the tensor-parallel group. Training saves through ``checkpointing``, which never holds
    the whole model.
    """
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    locals_ = {
        name: parameter.grad if gradients else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    return {
        name: gather_unsharded(local, name, state) for name, local in locals_.items() if local is not None
    }


def unsharded_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a sharded model on every rank, as the unsharded model's ``state_dict`` names them.

    A tied head is there under both its names, and so are buffers: an unsharded model loads it strictly.
    Collective over the tensor-parallel group.
    """
    whole = gather_state_dict(model)
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: whole[first_names[id(tensor)]] if id(tensor) in first_names else tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
