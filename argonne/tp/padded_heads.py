"""Heads stored wider than they are, so that kernels find their widths aligned: 170 features as 176.

Each half of a head is padded behind its own end: 85 features and three zeros, twice. So the rotation pairs
feature i with i + stored_dim / 2, as it always pairs halves, and turns the padding by an angle of zero.

Padding is rows of q, k and v and columns of o; they are zero and stay so. A score's derivative by padding of
q is padding of k, zero, and the other way round; what attention gives in the padding of v is zero, and so is
what the columns of o hand back. AdamW leaves a zero with a zero gradient a zero. Scores are scaled by
head_dim as it is, which the attention module keeps apart, and norms on heads see the true features only.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from argonne.tp.plan import HeadCounts, Style, TensorParallelPlan
from argonne.tp.slices import SliceMap


def attach_padded_heads(model: nn.Module, plan: TensorParallelPlan, heads: HeadCounts) -> None:
    """Let rotation and norms on heads take heads of ``heads.stored_dim``, where that is not head_dim."""
    if heads.stored_dim == heads.head_dim:
        return
    frequencies = model.rotary_frequencies
    assert isinstance(frequencies, Tensor)
    missing = (heads.stored_dim - heads.head_dim) // 2
    model.rotary_frequencies = F.pad(frequencies, (0, missing))  # angle 0: cosine 1, sine 0

    def true_features(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        stored = args[0].unflatten(-1, (2, heads.stored_dim // 2))
        return (stored[..., : heads.head_dim // 2].flatten(-2), *args[1:])

    def stored_features(_: nn.Module, __: Any, normed: Tensor) -> Tensor:
        return F.pad(normed.unflatten(-1, (2, heads.head_dim // 2)), (0, missing)).flatten(-2)

    for name, module in model.named_modules():
        rule = plan.rule_for(name)
        if rule is not None and rule.style is Style.SUMMED:  # a norm on heads
            module.register_forward_pre_hook(true_features)
            module.register_forward_hook(stored_features)


def padding_text(slice_map: SliceMap, heads: HeadCounts) -> str | None:
    """What widths padded to a multiple come to, in words; None where all are such multiples as they are."""
    ranks = range(slice_map.world_size)
    stored = sum(math.prod(slice_map.local_shape(name, rank)) for name in slice_map.names for rank in ranks)
    held = sum(
        box.numel for name in slice_map.names for rank in ranks for box in slice_map.rectangles(name, rank)
    )
    if heads.pad_to == 1 or stored == held:
        return None
    wider = f"heads of {heads.head_dim} stored as {heads.stored_dim}, "
    share = f"{(stored - held) / stored:.1%} of what the ranks store is padding"
    return f"to a multiple of {heads.pad_to}: {wider if heads.stored_dim > heads.head_dim else ''}{share}"
