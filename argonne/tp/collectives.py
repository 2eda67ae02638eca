"""The tensor-parallel group object, and its collectives with their gradients.

Every collective on the tensor-parallel group goes through one small object, which counts calls and
payload bytes. `ProcessTPGroup` speaks to other processes through functional collectives (the same ops in
eager and in compiled code; ``async_op=True`` in a backward pass would break the graph).
`SimulatedTPGroup` joins threads of one process and adds up explicitly, so that the very same layers can
be checked without any process group.

The region functions are named after Megatron-LM's (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022
for the sequence-parallel pairs): what a function does in the forward pass and what its gradient does.
A group of size 1 returns at once and counts nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SEQUENCE_DIM = 1
"""Activations are (batch, seq_len, hidden_size)."""


class CollectiveCounters:
    """Calls and payload bytes per kind of collective.

    Payload bytes are those of the unsharded side: the tensor of an all-reduce, the output of an
    all-gather, the input of a reduce-scatter.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.last = ""
        """Kind of the last one."""

    def add(self, kind: str, payload_bytes: int) -> None:
        """Count one collective."""
        self.last = kind
        self.calls[kind] += 1
        self.bytes[kind] += payload_bytes

    def reset(self) -> None:
        """Begin again at zero; the last kind stays."""
        self.calls.clear()
        self.bytes.clear()

    def totals(self) -> dict[str, tuple[int, int]]:
        """Kind -> (calls, payload bytes)."""
        return {kind: (count, self.bytes[kind]) for kind, count in self.calls.items()}

    @property
    def total_calls(self) -> int:
        """Collectives of all kinds."""
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        """Payload bytes of all kinds."""
        return sum(self.bytes.values())


class TPGroup:
    """The ranks that hold the slices of one model replica.

    ``start_*`` issues a collective and returns a tensor that must not be read before `wait`, so that
    work can be put between the two. Gathers and scatters run along dimension 0. ``owned=True`` says that
    the argument is a fresh tensor which may be overwritten.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.counters = CollectiveCounters()

    def start_all_reduce(self, tensor: Tensor, op: str = "sum", *, owned: bool = False) -> Tensor:
        """Reduce over the group. Shape unchanged."""
        if self.size == 1:
            return tensor
        self._count("all_reduce", tensor.numel() * tensor.element_size())
        return self._all_reduce(tensor, op, owned)

    def start_all_gather(self, tensor: Tensor) -> Tensor:
        """(local, ...) -> (size * local, ...), in rank order."""
        if self.size == 1:
            return tensor
        self._count("all_gather", self.size * tensor.numel() * tensor.element_size())
        return self._all_gather(tensor)

    def start_reduce_scatter(self, tensor: Tensor) -> Tensor:
        """(size * local, ...) -> (local, ...): the sum over the group, this rank's part of it."""
        if self.size == 1:
            return tensor
        self._count("reduce_scatter", tensor.numel() * tensor.element_size())
        return self._reduce_scatter(tensor)

    def wait(self, tensor: Tensor) -> Tensor:
        """Finish a started collective."""
        return tensor

    @property
    def reduces_in_place(self) -> bool:
        """Whether an owned tensor is overwritten by an all-reduce."""
        return False

    def all_reduce(self, tensor: Tensor, op: str = "sum", *, owned: bool = False) -> Tensor:
        """As `start_all_reduce`, finished."""
        return self.wait(self.start_all_reduce(tensor, op, owned=owned))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As `start_all_gather`, finished."""
        return self.wait(self.start_all_gather(tensor))

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """As `start_reduce_scatter`, finished."""
        return self.wait(self.start_reduce_scatter(tensor))

    def subgroup(self, size: int) -> TPGroup:
        """The group of ``size`` consecutive ranks this rank is in. Called by all ranks of this group."""
        raise NotImplementedError

    def _count(self, kind: str, payload_bytes: int) -> None:
        # A compiled graph is counted in its own nodes; a Python counter inside it would break it.
        if not torch.compiler.is_compiling():
            self.counters.add(kind, payload_bytes)

    def _all_reduce(self, tensor: Tensor, op: str, owned: bool) -> Tensor:
        raise NotImplementedError

    def _all_gather(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _reduce_scatter(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError


class ProcessTPGroup(TPGroup):
    """A group of processes, over ``torch.distributed``."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(process_group), dist.get_world_size(process_group))
        self.process_group = process_group
        self._name = process_group.group_name

    def wait(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else torch.ops._c10d_functional.wait_tensor(tensor)

    def subgroup(self, size: int) -> TPGroup:
        members = dist.get_process_group_ranks(self.process_group)
        first = self.rank - self.rank % size
        ranks = members[first : first + size]
        return ProcessTPGroup(dist.new_group(ranks, use_local_synchronization=True))

    @property
    def reduces_in_place(self) -> bool:
        return not torch.compiler.is_compiling()

    def _all_reduce(self, tensor: Tensor, op: str, owned: bool) -> Tensor:
        if owned and self.reduces_in_place:
            return torch.ops._c10d_functional.all_reduce_(tensor, op, self._name)
        return torch.ops._c10d_functional.all_reduce(tensor, op, self._name)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return torch.ops._c10d_functional.all_gather_into_tensor(tensor.contiguous(), self.size, self._name)

    def _reduce_scatter(self, tensor: Tensor) -> Tensor:
        return torch.ops._c10d_functional.reduce_scatter_tensor(
            tensor.contiguous(), "sum", self.size, self._name
        )


class _Rendezvous:
    """Where the threads of a simulated group lay down their tensors and meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Tensor | None] = [None] * size
        self.subgroups: dict[tuple[int, int], _Rendezvous] = {}
        self.lock = threading.Lock()


class SimulatedTPGroup(TPGroup):
    """A group of threads in one process; each reduction is an explicit sum in rank order."""

    def __init__(self, rank: int, size: int, rendezvous: _Rendezvous) -> None:
        super().__init__(rank, size)
        self._rendezvous = rendezvous

    @classmethod
    def create(cls, size: int) -> list[SimulatedTPGroup]:
        """The ``size`` members of one group, one for each thread."""
        rendezvous = _Rendezvous(size)
        return [cls(rank, size, rendezvous) for rank in range(size)]

    def subgroup(self, size: int) -> TPGroup:
        first = self.rank - self.rank % size
        with self._rendezvous.lock:
            part = self._rendezvous.subgroups.setdefault((first, size), _Rendezvous(size))
        return SimulatedTPGroup(self.rank - first, size, part)

    def abort(self) -> None:
        """Wake the other threads with an error, when this one has failed."""
        self._rendezvous.barrier.abort()
        for part in self._rendezvous.subgroups.values():
            part.barrier.abort()

    def _exchange(self, tensor: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        slots = self._rendezvous.slots
        slots[self.rank] = tensor.detach()
        self._rendezvous.barrier.wait()
        result = combine([slot for slot in slots if slot is not None])
        self._rendezvous.barrier.wait()
        return result

    def _all_reduce(self, tensor: Tensor, op: str, owned: bool) -> Tensor:
        def combine(parts: list[Tensor]) -> Tensor:
            total = parts[0].clone()
            for part in parts[1:]:
                if op == "max":
                    torch.maximum(total, part, out=total)
                else:
                    total.add_(part)
            return total

        return self._exchange(tensor, combine)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, torch.cat)

    def _reduce_scatter(self, tensor: Tensor) -> Tensor:
        local = tensor.shape[0] // self.size

        def combine(parts: list[Tensor]) -> Tensor:
            total = parts[0].narrow(0, self.rank * local, local).clone()
            for part in parts[1:]:
                total.add_(part.narrow(0, self.rank * local, local))
            return total

        return self._exchange(tensor, combine)


# ---------------------------------------------------------------------------------------------------
# Collectives along the sequence dimension of (batch, seq_len, hidden_size)


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


def start_gather_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """Issue the all-gather of (batch, local_seq_len, hidden); finish it with `finish_gather_sequence`."""
    return group.start_all_gather(tensor.movedim(SEQUENCE_DIM, 0).contiguous())


def finish_gather_sequence(started: Tensor, group: TPGroup, seq_len: int) -> Tensor:
    """-> (batch, seq_len, hidden), the padding stripped."""
    return group.wait(started)[:seq_len].movedim(0, SEQUENCE_DIM)


def start_scatter_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """Issue the reduce-scatter of padded partial sums (batch, seq_len, hidden)."""
    return group.start_reduce_scatter(pad_sequence(tensor, group.size).movedim(SEQUENCE_DIM, 0).contiguous())


def finish_scatter_sequence(started: Tensor, group: TPGroup) -> Tensor:
    """-> (batch, local_seq_len, hidden)."""
    return group.wait(started).movedim(0, SEQUENCE_DIM)


# ---------------------------------------------------------------------------------------------------
# Region functions


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_reduce(grads[0].contiguous()), None


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


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim, ctx.local = group, dim, tensor.shape[dim]
        return group.all_gather(tensor.movedim(dim, 0).contiguous()).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].narrow(ctx.dim, ctx.group.rank * ctx.local, ctx.local), None, None


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


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup) -> Tensor:
        ctx.group, ctx.seq_len = group, tensor.shape[SEQUENCE_DIM]
        return finish_scatter_sequence(start_scatter_sequence(tensor, group), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        started = start_gather_sequence(grads[0], ctx.group)
        return finish_gather_sequence(started, ctx.group, ctx.seq_len), None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TPGroup) -> Tensor:
        ctx.group, ctx.seq_len = group, tensor.shape[SEQUENCE_DIM]
        return _own_positions(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        started = start_gather_sequence(grads[0], ctx.group)
        return finish_gather_sequence(started, ctx.group, ctx.seq_len), None


def copy_to_region(tensor: Tensor, group: TPGroup) -> Tensor:
    """Entrance of a parallel region: identity forward, all-reduce backward (Megatron's f)."""
    return tensor if group.size == 1 else _CopyTo.apply(tensor, group)


def reduce_from_region(tensor: Tensor, group: TPGroup, *, owned: bool = False) -> Tensor:
    """Exit of a parallel region: all-reduce forward, identity backward (Megatron's g).

    ``owned``: the argument is a contiguous tensor of no further use, which may be overwritten.
    """
    return tensor if group.size == 1 else _ReduceFrom.apply(tensor, group, owned)


def gather_from_region(tensor: Tensor, group: TPGroup, dim: int = -1) -> Tensor:
    """(..., local) -> (..., size * local) along ``dim``: all-gather forward, own slice backward.

    Right where every rank computes the same from the gathered tensor, since the gradients are then equal.
    """
    return tensor if group.size == 1 else _GatherFrom.apply(tensor, group, dim % tensor.dim())


def scatter_to_region(tensor: Tensor, group: TPGroup, dim: int = -1) -> Tensor:
    """(..., size * local) -> (..., local) along ``dim``: own slice forward, all-gather backward."""
    if group.size == 1:
        return tensor
    if tensor.shape[dim] % group.size:
        raise ValueError(
            f"dimension {dim} has {tensor.shape[dim]} elements, which {group.size} does not divide"
        )
    return _ScatterTo.apply(tensor, group, dim % tensor.dim())


def gather_sequence(tensor: Tensor, group: TPGroup, seq_len: int, *, partial: bool = True) -> Tensor:
    """Sequence-parallel entrance: (batch, local_seq_len, hidden) -> (batch, seq_len, hidden).

    All-gather forward, reduce-scatter backward; padding is stripped and put back. ``partial=False`` is for a
    gradient that is equal on all ranks (made from the gathered tensor by all of them alike): each then takes
    its own positions of it, without communication.
    """
    return tensor if group.size == 1 else _GatherSequence.apply(tensor, group, seq_len, partial)


def reduce_scatter_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """Sequence-parallel exit: partial sums (batch, seq_len, hidden) -> (batch, local_seq_len, hidden).

    Reduce-scatter forward, all-gather backward.
    """
    return tensor if group.size == 1 else _ReduceScatterSequence.apply(tensor, group)


def split_sequence(tensor: Tensor, group: TPGroup) -> Tensor:
    """(batch, seq_len, hidden), equal on all ranks -> this rank's positions; all-gather backward."""
    return tensor if group.size == 1 else _SplitSequence.apply(tensor, group)
