"""Bytes that a micro-batch moves outside its products by formula, as ``argonne.benchmarks.traffic`` counts.

Coefficients are in tensors read and written. They were taken from the counter op by op, in bfloat16 along
CUDA's code path, and tests compare both at several shapes and degrees. What FSDP2 copies is not counted
there and follows from reading it.
"""

from __future__ import annotations

import math

from argonne.tp.chunked_loss import chunk_tokens
from argonne.tp.imbalance import local_features
from argonne.tp.plan import Style, Unit
from argonne.tp.plan_memory import LayoutSizes

_FLOAT32 = 4
UPDATE_BYTES = 40
"""A parameter: AdamW reads four and writes three float32 numbers, clipping two, the norm reads one."""
HEAD_DIM_STEP = 8
"""Attention kernels want head_dim to be a multiple; others are padded for each call."""
_LOGIT = 36
"""Bytes a logit: largest, sum of exponentials, gradient, widened to float32 and back."""
_CAPPED_LOGIT = 124
"""More with a soft cap: its tanh and slope, both ways."""


def elementwise_bytes(sizes: LayoutSizes) -> float:
    """Of one micro-batch of one rank: elementwise ops, copies and reductions."""
    return sizes.outline.num_layers * _layer(sizes) + _ends(sizes) + _replicas(sizes)


def _layer(sizes: LayoutSizes) -> float:
    outline, layout = sizes.outline, sizes.layout
    again = 0 if layout.recomputation == "none" else 1
    heads, normed = _heads(sizes, again), _normed(sizes)
    # Two norms (2 read and written forward, 5 backward) and their residual additions; sandwich norms too.
    stream = 26 + 7 * outline.output_norms + again * (7 + 2 * outline.output_norms)
    if layout.tp_size == 1:  # the gradients of q, k, v (gate, up) are added up outside their products
        stream += 9
    total = stream * sizes.stream + heads + (7 + 2 * again) * normed
    total += (19 + 2 * again) * _inner(sizes)  # the gated product, forward and backward
    if sizes.cast_bytes:  # weights, and their gradients back
        total += (2 + again) * (_FLOAT32 + sizes.cast_bytes) * sizes.block
    if sizes.divided > 1 and layout.batch_size > 1:  # the gathered sequence is put in order, and taken apart
        total += (20 + 6 * again) * sizes.whole_stream
    return total


def _inner(sizes: LayoutSizes) -> float:
    """Bytes of one tensor inside the MLP."""
    outline, layout = sizes.outline, sizes.layout
    width = max((p.out_features for p in outline.projections if p.unit is Unit.FEATURES), default=0)
    inner = [p for p in outline.projections if p.unit is Unit.FEATURES and p.style is Style.ROW]
    width = max((p.in_features for p in inner), default=width)
    return layout.tokens * math.ceil(width / layout.tp_size) * layout.element_bytes


def _heads(sizes: LayoutSizes, again: int) -> float:
    """Rotation of queries and keys, and where head_dim wants padding, the copies that make it."""
    outline, layout = sizes.outline, sizes.layout
    columns = [p for p in outline.projections if p.style is Style.COLUMN and p.unit is not Unit.FEATURES]
    token = layout.tokens * layout.element_bytes
    features = local_features(outline, columns, layout.tp_size)
    queries = local_features(outline, columns[:1], layout.tp_size)
    values = (features - queries) / 2
    total = (15 + 7.5 * again) * token * (features - values)
    head_dim = outline.heads.stored_dim
    if head_dim % HEAD_DIM_STEP:
        padded = math.ceil(head_dim / HEAD_DIM_STEP) * HEAD_DIM_STEP / head_dim
        once = (1 + padded) * features
        total += token * ((2 + again) * once + (4 + 2 * again) * queries + (1 + padded) * queries)
    return total


def _normed(sizes: LayoutSizes) -> float:
    """Bytes of what norms on heads take."""
    layout = sizes.layout
    width = local_features(sizes.outline, sizes.outline.normed, layout.tp_size)
    return layout.tokens * layout.element_bytes * width


def _ends(sizes: LayoutSizes) -> float:
    """Embedding, final norm, head and loss."""
    layout = sizes.layout
    chunk = layout.tokens
    if layout.loss_chunk_tokens != 0:
        asked = chunk_tokens(layout.loss_chunk_tokens, sizes.vocabulary, layout.element_bytes)
        chunk = min(chunk, asked)
    logits = layout.tokens * sizes.vocabulary
    capped = _CAPPED_LOGIT if getattr(sizes.config, "logit_softcap", 0.0) else 0
    head = (10 * math.ceil(layout.tokens / chunk) + 26) * sizes.head
    stream = 10 * sizes.stream + 28 * sizes.whole_stream if sizes.divided > 1 else 27 * sizes.stream
    return (_LOGIT + capped) * logits + head + stream


def _replicas(sizes: LayoutSizes) -> float:
    """FSDP2's copies into and out of gathers, and its widening of gradients; sums of micro-batches."""
    layout = sizes.layout
    added = 3 * _FLOAT32 * sizes.local * (layout.accumulation - 1) / layout.accumulation
    if not layout.is_cut:
        return added
    element = layout.element_bytes
    gather = (_FLOAT32 + element) / layout.shards + 2 * element
    blocks = sizes.block * sizes.outline.num_layers
    gathered = sizes.local + (0 if layout.keeps_gathered else blocks)
    return added + gather * gathered + (element + _FLOAT32) * sizes.local
