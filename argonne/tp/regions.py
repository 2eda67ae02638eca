"""The regions of a tensor-parallel model: what each does in the forward pass, and what its gradient does.

========================  ==============  ==============  ====================================
here                      forward         backward        Megatron-LM
========================  ==============  ==============  ====================================
copy_to_region            identity        all-reduce      copy_to_..._region (f)
reduce_from_region        all-reduce      identity        reduce_from_..._region (g)
scatter_to_region         own slice       all-gather      scatter_to_..._region
gather_from_region        all-gather      own slice       gather_from_..._region
split_sequence            own positions   all-gather      scatter_to_sequence_..._region
gather_sequence           all-gather      reduce-scatter  gather_from_sequence_..._region
  with partial=False      all-gather      own positions     with tensor_parallel_output_grad=False
reduce_scatter_sequence   reduce-scatter  all-gather      reduce_scatter_to_sequence_..._region
========================  ==============  ==============  ====================================

The first four are those of Shoeybi et al. 2019, section 3; the others divide the sequence (Korthikanti et al.
2022, section 4). In a group of size 1 each returns its argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argonne.tp.group import TPGroup

SEQUENCE_DIM = 1
"""Activations are (batch, seq_len, hidden_size)."""


# ---------------------------------------------------------------------------------------------------
# Regions of whole sequences


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_reduce(grads[0].contiguous()), None


def copy_to_region(tensor: Tensor, group: TPGroup) -> Tensor:
    """Entrance of a parallel region: identity forward, all-reduce backward (Megatron's f)."""
    return tensor if group.size == 1 else _CopyTo.apply(tensor, group)


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup, owned: bool) -> Tensor:
        if not owned or not group.reduces_in_place:
            return group.all_reduce(tensor.contiguous())
        ctx.mark_dirty(tensor)
        group.all_reduce(tensor, owned=True)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


def reduce_from_region(tensor: Tensor, group: TPGroup, *, owned: bool = False) -> Tensor:
    """Exit of a parallel region: all-reduce forward, identity backward (Megatron's g).

    ``owned``: the argument is a contiguous tensor of no further use, which may be overwritten.
    """
    return tensor if group.size == 1 else _ReduceFrom.apply(tensor, group, owned)


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        local = tensor.shape[dim] // group.size
        return tensor.narrow(dim, group.rank * local, local).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gathered = ctx.group.all_gather(grads[0].movedim(ctx.dim, 0).contiguous())
        return gathered.movedim(0, ctx.dim), None, None


def scatter_to_region(tensor: Tensor, group: TPGroup, dim: int = -1) -> Tensor:
    """(..., size * local) -> (..., local) along ``dim``: own slice forward, all-gather backward."""
    if group.size == 1:
        return tensor
    if tensor.shape[dim] % group.size:
        raise ValueError(
            f"dimension {dim} has {tensor.shape[dim]} elements, which {group.size} does not divide"
        )
    return _ScatterTo.apply(tensor, group, dim % tensor.dim())


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.local = group, dim, tensor.shape[dim]
        return group.all_gather(tensor.movedim(dim, 0).contiguous()).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].narrow(ctx.dim, ctx.group.rank * ctx.local, ctx.local), None, None


def gather_from_region(tensor: Tensor, group: TPGroup, dim: int = -1) -> Tensor:
    """(..., local) -> (..., size * local) along ``dim``: all-gather forward, own slice backward.

    Right where every rank computes the same from the gathered tensor, since the gradients are then equal.
    """
    return tensor if group.size == 1 else _GatherFrom.apply(tensor, group, dim % tensor.dim())


# ---------------------------------------------------------------------------------------------------
# Sequence parallelism: activations (batch, seq_len, hidden_size) divided along the sequence


@dataclass(eq=False)
class SequenceState:
    """What the layers of one sharded model must know of the sequence they are working on."""

    enabled: bool = False
    """Sequence parallelism: norms and the residual stream hold (batch, local_seq_len, hidden_size)."""
    seq_len: int = 0
    """Length of the whole sequence in the forward pass under way; set at the model's entrance."""


def local_seq_len(seq_len: int, size: int) -> int:
    """Positions per rank under sequence parallelism; the last ranks' slices are padded with zeros."""
    return -(-seq_len // size)


def pad_sequence(tensor: Tensor, size: int) -> Tensor:
    """Zero positions at the end, so that the sequence divides by ``size``."""
    missing = local_seq_len(tensor.shape[SEQUENCE_DIM], size) * size - tensor.shape[SEQUENCE_DIM]
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor


def _own_positions(tensor: Tensor, group: TPGroup) -> Tensor:
    """(batch, seq_len, hidden) -> this rank's (batch, local_seq_len, hidden), zero beyond the end."""
    local = local_seq_len(tensor.shape[SEQUENCE_DIM], group.size)
    return pad_sequence(tensor, group.size).narrow(SEQUENCE_DIM, group.rank * local, local).contiguous()


# Each rank's part is gathered whole, (batch, local_seq_len, hidden), and cut and joined by split and cat: one
# copy of the sequence, and the form that torch's asynchronous tensor parallelism looks for in a graph.


def start_gather_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """Issue the all-gather of (batch, local_seq_len, hidden); finish it with `finish_gather_sequence`."""
    return group.start_all_gather(tensor.contiguous())


def finish_gather_sequence(started: Tensor, group: TPGroup, seq_len: int) -> Tensor:
    """-> (batch, seq_len, hidden), padding stripped, put in order once and not by each product made of it."""
    gathered = group.wait(started)
    local = gathered.shape[SEQUENCE_DIM]
    if gathered.shape[0] == group.size and not torch.compiler.is_compiling():
        # One sequence is in order already.
        return gathered.reshape(1, group.size * local, -1)[:, :seq_len]
    parts = gathered.chunk(group.size)
    if seq_len == group.size * local:
        return torch.cat(parts, dim=SEQUENCE_DIM)
    lengths = [max(0, min(local, seq_len - rank * local)) for rank in range(group.size)]
    return torch.cat([p[:, :length] for p, length in zip(parts, lengths, strict=True)], dim=SEQUENCE_DIM)


def start_scatter_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """Issue the reduce-scatter of padded partial sums (batch, seq_len, hidden)."""
    padded = pad_sequence(tensor, group.size)
    if padded.shape[0] == 1 and not torch.compiler.is_compiling():
        return group.start_reduce_scatter(padded.reshape(group.size, -1, padded.shape[-1]))
    return group.start_reduce_scatter(torch.cat(padded.chunk(group.size, dim=SEQUENCE_DIM)))


def finish_scatter_sequence(started: Tensor, group: TPGroup) -> Tensor:
    """-> (batch, local_seq_len, hidden)."""
    return group.wait(started)


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup) -> Tensor:
        ctx.group, ctx.seq_len = group, tensor.shape[SEQUENCE_DIM]
        return _own_positions(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        started = start_gather_sequence(grads[0], ctx.group)
        return finish_gather_sequence(started, ctx.group, ctx.seq_len), None


def split_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """(batch, seq_len, hidden), equal on all ranks -> this rank's positions; all-gather backward."""
    return tensor if group.size == 1 else _SplitSequence.apply(tensor, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup, seq_len: int, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        return finish_gather_sequence(start_gather_sequence(tensor, group), group, seq_len)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.partial:
            return _own_positions(grads[0], ctx.group), None, None, None
        scattered = finish_scatter_sequence(start_scatter_sequence(grads[0], ctx.group), ctx.group)
        return scattered, None, None, None


def gather_sequence(tensor: Tensor, group: TPGroup, seq_len: int, *, partial: bool = True) -> Tensor:
    """Sequence-parallel entrance: (batch, local_seq_len, hidden) -> (batch, seq_len, hidden).

    All-gather forward, reduce-scatter backward; padding is stripped and put back. ``partial=False`` is for a
    gradient that is equal on all ranks (made from the gathered tensor by all of them alike): each then takes
    its own positions of it, without communication.
    """
    return tensor if group.size == 1 else _GatherSequence.apply(tensor, group, seq_len, partial)


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup) -> Tensor:
        ctx.group, ctx.seq_len = group, tensor.shape[SEQUENCE_DIM]
        return finish_scatter_sequence(start_scatter_sequence(tensor, group), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        started = start_gather_sequence(grads[0], ctx.group)
        return finish_gather_sequence(started, ctx.group, ctx.seq_len), None


def reduce_scatter_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """Sequence-parallel exit: partial sums (batch, seq_len, hidden) -> (batch, local_seq_len, hidden).

    Reduce-scatter forward, all-gather backward.
    """
    return tensor if group.size == 1 else _ReduceScatterSequence.apply(tensor, group)
