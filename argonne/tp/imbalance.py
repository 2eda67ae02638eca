"""What unequal shares cost: the ranks wait for the one that has the most to multiply."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import nn

from argonne.tp.head_cuts import head_range
from argonne.tp.plan import Style, Unit, build_slice_map

if TYPE_CHECKING:
    from argonne.tp.costs import ModelOutline, Projection


def head_imbalance(query_heads: int, tp_size: int) -> float:
    """Query heads of the rank that has the most over the mean; 1.0 where the degree divides them."""
    return -(-query_heads // tp_size) * tp_size / query_heads


@lru_cache(maxsize=64)
def work_imbalance(outline: ModelOutline, model: nn.Module, tp_size: int, seq_len: int) -> float:
    """Multiplications of the slowest rank over the mean: its products, padding included, and its heads.

    ``model`` is unsharded (meta tensors will do). Per token, as in ``flops_per_token``: a multiplication a
    weight, and seq_len * head_dim a layer and query head (causal attention at half, two products).
    """
    heads = outline.heads
    slice_map = build_slice_map(model, outline.plan, tp_size, heads.pad_to)
    embedding, head = f"{outline.plan.embedding}.weight", f"{outline.plan.head}.weight"
    looked_up = {embedding} if head in slice_map.names else set()
    matrices = [name for name in slice_map.names if len(slice_map.shape(name)) > 1 and name not in looked_up]
    attention = outline.num_layers * seq_len * heads.stored_dim
    work = [
        sum(math.prod(slice_map.tp_local_shape(name, rank)) for name in matrices)
        + attention * len(head_range(heads.query_heads, tp_size, rank))
        for rank in range(tp_size)
    ]
    return max(work) * tp_size / sum(work)


def local_features(outline: ModelOutline, projections: Iterable[Projection], tp_size: int) -> float:
    """What column layers give and row layers take on the fullest rank, per token."""
    projections = list(projections)
    divided = sum(
        p.out_features if p.style is Style.COLUMN else p.in_features
        for p in projections
        if p.unit is Unit.FEATURES
    )
    units = [p.unit for p in projections if p.unit is not Unit.FEATURES]
    heads = max(sum(outline.heads.width(unit, tp_size, rank) for unit in units) for rank in range(tp_size))
    return divided / tp_size + heads
