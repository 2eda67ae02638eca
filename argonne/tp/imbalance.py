"""What unequal shares cost: the ranks wait for the one that has the most to multiply."""

from __future__ import annotations

import math

from torch import nn

from argonne.tp.costs import ModelOutline
from argonne.tp.plan import HeadCounts, build_slice_map
from argonne.tp.slices import head_range


def head_imbalance(query_heads: int, tp_size: int) -> float:
    """Query heads of the rank that has the most over the mean; 1.0 where the degree divides them."""
    return -(-query_heads // tp_size) * tp_size / query_heads


def work_imbalance(outline: ModelOutline, model: nn.Module, tp_size: int, seq_len: int) -> float:
    """Multiplications of the slowest rank over the mean: its products, padding included, and its heads.

    ``model`` is unsharded (meta tensors will do). Per token, as in ``flops_per_token``: a multiplication a
    weight, and seq_len * head_dim a layer and query head (causal attention at half, two products).
    """
    heads = HeadCounts.from_config(getattr(model, "config", None))
    slice_map = build_slice_map(model, outline.plan, tp_size)
    embedding, head = f"{outline.plan.embedding}.weight", f"{outline.plan.head}.weight"
    looked_up = {embedding} if head in slice_map.names else set()
    matrices = [name for name in slice_map.names if len(slice_map.shape(name)) > 1 and name not in looked_up]
    attention = outline.num_layers * seq_len * heads.head_dim
    work = [
        sum(math.prod(slice_map.tp_local_shape(name, rank)) for name in matrices)
        + attention * len(head_range(heads.query_heads, tp_size, rank))
        for rank in range(tp_size)
    ]
    return max(work) * tp_size / sum(work)
