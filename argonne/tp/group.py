"""The tensor-parallel group: the ranks that hold the slices of one model, and the collectives among them.

Every collective of the split goes through one small object, which counts calls and payload bytes.
`ProcessTPGroup` issues functional collectives over a process group: the same ops in eager and in compiled
code, where ``async_op=True`` in a backward pass would break the graph. `SimulatedTPGroup` joins threads of
one process and adds up explicitly, so that the very same layers can be checked without any process group.
A group of size 1 returns at once and counts nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


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

    def exchange(self, tensor: Tensor, sizes: list[int], payload_bytes: int) -> Tensor:
        """Swap parts with each rank: (sum of sizes,), the part of ``sizes[r]`` elements being rank r's.

        Two ranks send each other as much. ``payload_bytes``: what all ranks send, for the count.
        """
        if self.size == 1:
            return tensor
        self._count("all_to_all", payload_bytes)
        return self.wait(self._all_to_all(tensor, sizes))

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

    def _all_to_all(self, tensor: Tensor, sizes: list[int]) -> Tensor:
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

    def _all_to_all(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        return torch.ops._c10d_functional.all_to_all_single(tensor.contiguous(), sizes, sizes, self._name)


def as_tp_group(mesh: DeviceMesh | dist.ProcessGroup | TPGroup | None) -> TPGroup:
    """The group object of a mesh's dimension "tp" (or its only one), of a process group, or of the world."""
    if isinstance(mesh, TPGroup):
        return mesh
    if isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names or ()
        return ProcessTPGroup(mesh.get_group("tp") if "tp" in names else mesh.get_group())
    if mesh is None:
        world = dist.group.WORLD
        return TPGroup(0, 1) if world is None else ProcessTPGroup(world)
    return ProcessTPGroup(mesh)


class _Rendezvous:
    """What the threads of a simulated group share: a slot for each rank's tensor, and a barrier."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size
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

    def _exchange(self, given: T, combine: Callable[[list[T]], Tensor]) -> Tensor:
        slots = self._rendezvous.slots
        slots[self.rank] = given
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

        return self._exchange(tensor.detach(), combine)

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor.detach(), torch.cat)

    def _all_to_all(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        parts = tensor.detach().split(sizes)
        return self._exchange(parts, lambda sent: torch.cat([parts[self.rank] for parts in sent]))

    def _reduce_scatter(self, tensor: Tensor) -> Tensor:
        local = tensor.shape[0] // self.size

        def combine(parts: list[Tensor]) -> Tensor:
            total = parts[0].narrow(0, self.rank * local, local).clone()
            for part in parts[1:]:
                total.add_(part.narrow(0, self.rank * local, local))
            return total

        return self._exchange(tensor.detach(), combine)
