"""Copies of weights stay equal on all ranks that hold them: ``--replica-check-interval``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from argonne.errors import PeerError
from argonne.ranks.world import Parallel
from argonne.tp.slices import SliceMap

_CHUNK_ELEMENTS = 1 << 22
"""Elements that are widened to int64 at one time."""


def checksum(tensor: Tensor) -> Tensor:
    """0-d int64: the tensor's bits, each element weighted by its place; equal tensors give equal sums.

    Integer arithmetic modulo 2^64, so the order of summation does not matter.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    odd = 2 * torch.arange(min(len(bits), _CHUNK_ELEMENTS), device=flat.device) + 1
    for number, chunk in enumerate(bits.split(_CHUNK_ELEMENTS)):
        total += (chunk.long() * odd[: len(chunk)]).sum() * (2 * number + 1)
    return total


def shared_parameters(slice_map: SliceMap) -> tuple[str, ...]:
    """Parameters of which more than one rank holds the same elements."""
    if slice_map.replicated:
        return slice_map.names
    if slice_map.tp_size == 1:
        return ()
    cuts = ((name, slice_map.cut(name)) for name in slice_map.names)
    return tuple(name for name, cut in cuts if cut is None or cut.sharers > 1)


def check_replicas(parameters: Mapping[str, Tensor], slice_map: SliceMap, parallel: Parallel) -> int:
    """Compare checksums of all copies of weights: norms, shared key/value heads, and all of them under
    DDP and hsdp.

    ``parameters`` are local plain tensors (``argonne.ranks.replicas.local_parameters``), ``slice_map`` the
    run's, with its data parallelism. Collective over all ranks (8 bytes for each part that several hold).
    Returns how many parameters have copies.

    Raises:
        PeerError: on all ranks, naming the first parameter whose copies differ and the rank that differs.
    """
    names = shared_parameters(slice_map)
    if not names or parallel.control_group is None:
        return 0
    parts = [(name, part) for name in names for part in slice_map.copies(name)]
    none = torch.zeros((), dtype=torch.int64, device=parameters[names[0]].device)
    own = torch.stack(
        [
            checksum(parameters[name][part[parallel.rank].local_index]) if parallel.rank in part else none
            for name, part in parts
        ]
    ).cpu()
    sums = [torch.empty_like(own) for _ in range(parallel.world_size)]
    dist.all_gather(sums, own, group=parallel.control_group)
    for index, (name, part) in enumerate(parts):
        _check_equal(name, {rank: int(sums[rank][index]) for rank in part})
    return len(names)


def _check_equal(name: str, sums: Mapping[int, int]) -> None:
    values = list(sums.values())
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    odd = [rank for rank, value in sums.items() if value != usual]
    if odd:
        same = next(rank for rank, value in sums.items() if value == usual)
        raise PeerError(
            f"{name} is no longer the same on all ranks (--replica-check-interval): rank {odd[0]} differs "
            f"from rank {same} ({len(odd)} of {len(values)} copies differ); resume from the last checkpoint; "
            "if it happens again, suspect a faulty device"
        )
