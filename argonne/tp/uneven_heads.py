"""Query heads in unequal shares: key/value heads of which a rank's query heads take different numbers.

Heads 6 to 9 of a model with three query heads to a key/value head need key/value heads 2 and 3, the first
with three query heads and the second with one. Attention kernels take groups of one size only, so what the
projections give is repeated: each key/value head once for every so many query heads (the greatest common
divisor of their numbers, here one). Norms, rotation, masks and caches then see heads as they know them. Where
the groups are of one size nothing is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from argonne.tp.group import TPGroup
from argonne.tp.plan import HeadCounts, TensorParallelPlan
from argonne.tp.swap import matching

_KEYS_AND_VALUES = ("k_proj", "v_proj")


class HeadCopies:
    """Repeats key/value heads, (..., heads * head_dim) -> (..., repeated heads * head_dim).

    ``counts``: how many query heads take each of them.
    """

    def __init__(self, counts: tuple[int, ...], head_dim: int) -> None:
        groups = math.gcd(*counts)
        self.times = tuple(count // groups for count in counts)
        self.head_dim = head_dim

    def __call__(self, projected: Tensor) -> Tensor:
        heads = projected.unflatten(-1, (len(self.times), self.head_dim)).split(1, dim=-2)
        lead = projected.shape[:-1]
        copies = [head.expand(*lead, n, self.head_dim) for head, n in zip(heads, self.times, strict=True)]
        return torch.cat(copies, dim=-2).flatten(-2)


class _RepeatedProducts:
    """Stands in for the method of a block that gives queries, keys and values."""

    def __init__(
        self, products: Callable[[Tensor], tuple[Tensor, ...]], members: tuple[str, ...], copies: HeadCopies
    ) -> None:
        self.products, self.copies = products, copies
        self.repeats = tuple(member in _KEYS_AND_VALUES for member in members)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        products = self.products(x)
        return tuple(
            self.copies(y) if repeat else y for y, repeat in zip(products, self.repeats, strict=True)
        )


def attach_head_copies(model: nn.Module, plan: TensorParallelPlan, group: TPGroup, heads: HeadCounts) -> None:
    """Repeat what key and value projections give where this rank's query heads are not in equal groups."""
    counts = heads.grouped(group.size, group.rank)
    if len(set(counts)) == 1:
        return
    copies = HeadCopies(counts, heads.stored_dim)
    seams = {seam.pattern: seam for seam in plan.seams}
    for attention in matching(model, plan.attention):
        seam = seams.get(plan.attention)
        if seam is not None:
            products = getattr(attention, seam.method)
            setattr(attention, seam.method, _RepeatedProducts(products, seam.members, copies))
            continue
        for name in _KEYS_AND_VALUES:
            attention.get_submodule(name).register_forward_hook(lambda _, __, output: copies(output))
