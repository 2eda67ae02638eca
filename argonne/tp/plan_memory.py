"""Memory of a rank while it trains: what is held at the moments that can be the fullest.

Weights, gradients and Adam state are float32. Beside them lie, at different moments, what autograd keeps, the
logits, the 16-bit copies of weights that autocast makes, and what a product or a norm needs while it runs.
The peak is the fullest of five moments of a step; ``docs/planning.md`` has the formulas and what they were
checked against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from argonne.tp.chunked_loss import chunk_tokens
from argonne.tp.costs import ModelOutline, activation_bytes
from argonne.tp.head_cuts import head_range
from argonne.tp.imbalance import local_features
from argonne.tp.plan import Style
from argonne.tp.shape_only import most_elements, planned_slice_map

_FLOAT32 = 4
_LOSS_ELEMENTS = 1 << 24
"""Logits that the loss holds in float32 at a time (``argonne.tp.loss``)."""
OUTSIDE_BYTES = 2_500_000_000
"""On a GPU beside torch's allocator: CUDA's context, NCCL's buffers, cuBLAS's workspace (2 to 3 GB)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model and its batch lie on the ranks."""

    tp_size: int = 1
    dp_size: int = 1
    fsdp: bool = True
    """Replicas share weights and state (FSDP2); otherwise each holds all of them (DDP)."""
    shard_size: int | None = None
    """Neighbouring replicas that share them among themselves (hsdp: those of a node); None: all do."""
    keeps_gathered: bool = False
    """FSDP2 keeps gathered blocks from the forward to the backward pass (no reshard after forward)."""
    sequence_parallel: bool = False
    recomputation: str = "none"
    batch_size: int
    """Sequences of a micro-batch and replica."""
    block_size: int
    accumulation: int = 1
    element_bytes: int = 2
    """Of the compute dtype: 2, or 4 in float32."""
    loss_chunk_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Of one micro-batch of one replica."""
        return self.batch_size * self.block_size

    @property
    def is_cut(self) -> bool:
        """Whether replicas share weights."""
        return self.shards > 1

    @property
    def shards(self) -> int:
        """Replicas among which weights and state are divided."""
        return (self.shard_size or self.dp_size) if self.fsdp else 1

    @property
    def copies(self) -> int:
        """Copies of each shard, on other replicas."""
        return self.dp_size // self.shards


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on the fullest rank. Each part is its own largest; not all are there at the peak.

    So ``total`` is less than the sum: without accumulation the gradients come while the activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass."""
    logits: int
    """Logits with their gradient, or what a chunk of them takes."""
    buffers: int
    """Copies of weights, gathered tensors and what an operation needs while it runs."""
    total: int
    """At the fullest moment of a step."""


class LayoutSizes:
    """Sizes of a model on its fullest rank, in elements and bytes; formulas of memory and time share them."""

    def __init__(self, outline: ModelOutline, model: nn.Module, layout: Layout) -> None:
        self.outline, self.layout = outline, layout
        self.slice_map = planned_slice_map(model, outline.plan, layout.tp_size, outline.heads.pad_to)
        self.config: Any = model.config
        self.local = most_elements(self.slice_map, self.slice_map.names)
        self.held = math.ceil(self.local / layout.shards)
        first = [name for name in self.slice_map.names if name.startswith(f"{outline.plan.first_block}.")]
        self.block = most_elements(self.slice_map, tuple(first))
        self.vocabulary = self.slice_map.tp_local_shape(f"{outline.plan.embedding}.weight", 0)[0]
        self.head = self.vocabulary * outline.hidden_size
        self.tied = f"{outline.plan.head}.weight" not in self.slice_map.names
        self.wide = layout.element_bytes >= _FLOAT32
        width = outline.hidden_size * layout.element_bytes
        self.whole_stream = layout.tokens * width
        self.divided = layout.tp_size if layout.sequence_parallel else 1
        self.stream = math.ceil(self.whole_stream / self.divided)

    @property
    def cast_bytes(self) -> int:
        """Of an element of a weight in the compute dtype, where autocast makes a copy: under FSDP the
        gathered weight is the copy."""
        return 0 if self.wide or self.layout.is_cut else self.layout.element_bytes

    def statistics(self) -> int:
        """Float32 numbers of one layer: a norm's one a row, the softmax's one a query head."""
        outline, tokens, size = self.outline, self.layout.tokens, self.layout.tp_size
        norms = tokens * (2 + outline.output_norms) / self.divided
        stored_dim = outline.heads.stored_dim
        heads = max(
            sum(outline.heads.width(p.unit, size, rank) for p in outline.normed) / stored_dim
            + len(head_range(outline.heads.query_heads, size, rank))
            for rank in range(size)
        )
        return round(_FLOAT32 * (norms + tokens * heads))

    def layer(self) -> int:
        """All that one layer keeps."""
        outline, layout = self.outline, self.layout
        whole = activation_bytes(
            outline, layout.tokens, layout.tp_size, sequence_parallel=layout.sequence_parallel
        )
        ends = 2 * 2 * layout.tokens * outline.hidden_size / self.divided
        kept = (whole - ends) / outline.num_layers * layout.element_bytes / 2
        return round(kept) + self.statistics()

    def kept_layer(self) -> int:
        """What a layer keeps under the layout's recomputation."""
        outline, layout = self.outline, self.layout
        if layout.recomputation == "none":
            return self.layer()
        if layout.recomputation == "full":
            return self.stream
        columns = [p for p in outline.projections if p.style is Style.COLUMN]
        features = local_features(outline, columns, layout.tp_size)
        products = round(layout.tokens * features * layout.element_bytes)
        # The two exits; with sequence parallelism their products stay whole, and both gathers are kept.
        exits = 2 * self.stream if self.divided == 1 else 2 * self.stream + 4 * self.whole_stream
        return self.stream + products + exits


@dataclass(frozen=True, kw_only=True)
class _Moment:
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.buffers


def rank_memory(outline: ModelOutline, model: nn.Module, layout: Layout) -> RankMemory:
    """Memory of the fullest rank of ``model`` (unsharded, meta tensors will do) under ``layout``."""
    sizes = LayoutSizes(outline, model, layout)
    moments = (
        _loss(sizes),
        _after_loss(sizes),
        _block_backward(sizes, last=False),
        _block_backward(sizes, last=True),
        _embedding_backward(sizes),
    )
    weights, optimizer = _FLOAT32 * sizes.held, 2 * _FLOAT32 * sizes.held
    return RankMemory(
        weights=weights,
        gradients=_all_gradients(sizes),
        optimizer=optimizer,
        activations=max(moment.activations for moment in moments),
        logits=max(moment.logits for moment in moments),
        buffers=max(moment.buffers for moment in moments),
        total=weights + optimizer + max(moment.total for moment in moments),
    )


def _standing_gradients(sizes: LayoutSizes) -> int:
    """Gradients that are there when a backward pass begins: of the micro-batch before, or DDP's buckets.

    FSDP2 adds micro-batches up before it reduces, so that until the last one a rank holds those of whole
    weights.
    """
    layout = sizes.layout
    replicas = layout.dp_size > 1 and not layout.fsdp
    return _FLOAT32 * sizes.local if layout.accumulation > 1 or replicas else 0


def _all_gradients(sizes: LayoutSizes) -> int:
    """Once a backward pass has made them all."""
    return max(_FLOAT32 * sizes.held, _standing_gradients(sizes))


def _activations(sizes: LayoutSizes) -> int:
    """All that is kept when the loss is computed: layers, final norm and rotary tables."""
    tables = 2 * _FLOAT32 * sizes.layout.block_size * sizes.outline.heads.stored_dim
    ends = 2 * sizes.stream + _FLOAT32 * sizes.layout.tokens // sizes.divided
    return sizes.outline.num_layers * sizes.kept_layer() + ends + tables


def _copies(sizes: LayoutSizes, *, in_forward: bool = False) -> int:
    """Weights beside the float32 ones while the forward pass ends: autocast's copies, or what is gathered.

    Until a forward pass has ended autocast keeps its copies, recomputation or not.
    """
    blocks = sizes.block * sizes.outline.num_layers
    if sizes.layout.is_cut:
        return sizes.layout.element_bytes * _gathered(sizes, sizes.outline.num_layers)
    return sizes.cast_bytes * blocks * (in_forward or sizes.layout.recomputation == "none")


def _gathered(sizes: LayoutSizes, layers: int) -> int:
    """Elements that FSDP2 has gathered: the root's, and a block or two, or all ``layers`` where they stay,
    with the buffer of a gather."""
    blocks = 1 + layers if sizes.layout.keeps_gathered else 2
    return sizes.local - sizes.block * sizes.outline.num_layers + blocks * sizes.block


def _loss_in_chunks(sizes: LayoutSizes) -> bool:
    return sizes.layout.loss_chunk_tokens != 0


def _loss(sizes: LayoutSizes) -> _Moment:
    """The gradient of the logits is being made."""
    layout = sizes.layout
    element, head = layout.element_bytes, sizes.head
    row = sizes.vocabulary * element
    gathered = sizes.whole_stream if sizes.divided > 1 else 0
    if not _loss_in_chunks(sizes):
        return _Moment(
            gradients=_standing_gradients(sizes),
            activations=_activations(sizes),
            logits=2 * layout.tokens * row,
            buffers=_copies(sizes) + sizes.cast_bytes * head + gathered + _loss_work(sizes, layout.tokens),
        )
    chunk = min(layout.tokens, chunk_tokens(layout.loss_chunk_tokens, sizes.vocabulary, element))
    product = element * head if not sizes.wide or chunk < layout.tokens else 0
    made = sizes.whole_stream + _FLOAT32 * head + product
    return _Moment(
        gradients=_standing_gradients(sizes),
        activations=_activations(sizes),
        logits=chunk * row + max(_loss_work(sizes, chunk, sums=True), made),
        buffers=_copies(sizes, in_forward=True) + sizes.cast_bytes * head + gathered,
    )


def _loss_work(sizes: LayoutSizes, tokens: int, *, sums: bool = False) -> int:
    """Float32 copies that the loss makes of some rows at a time: the wider logits and, with a soft cap, the
    capped ones and their slope; ``sums``: the copy that is exponentiated and summed counts as well."""
    wide = min(tokens * sizes.vocabulary, _LOSS_ELEMENTS) * _FLOAT32
    capped = 2 * wide if getattr(sizes.config, "logit_softcap", 0.0) else 0
    if not sizes.wide:
        plain = sums and not capped and not getattr(sizes.config, "z_loss_weight", 0.0)
        # The part that is written back, rounded; plain cross entropy rounds as it writes.
        rounded = 0 if plain else wide * sizes.layout.element_bytes // _FLOAT32
        return capped + wide + rounded
    return max(capped, wide * sums)


def _after_loss(sizes: LayoutSizes) -> _Moment:
    """The head's weight has its gradient: in the compute dtype, then in float32."""
    layout, head = sizes.layout, sizes.head
    if _loss_in_chunks(sizes):
        return _Moment(
            gradients=_standing_gradients(sizes) + _FLOAT32 * head,
            activations=_activations(sizes),
            buffers=_copies(sizes) + sizes.stream + sizes.whole_stream,
        )
    narrow = 0 if sizes.wide else layout.element_bytes * head
    return _Moment(
        gradients=_standing_gradients(sizes) + _FLOAT32 * head + narrow,
        activations=_activations(sizes),
        logits=layout.tokens * sizes.vocabulary * layout.element_bytes,
        buffers=_copies(sizes) + sizes.cast_bytes * head + sizes.whole_stream,
    )


def _block_backward(sizes: LayoutSizes, *, last: bool) -> _Moment:
    """In the backward pass of the first block that it reaches, or of the last."""
    layout, element = sizes.layout, sizes.layout.element_bytes
    layers = 1 if last else sizes.outline.num_layers
    remade = 0 if layout.recomputation == "none" else sizes.layer() + sizes.cast_bytes * sizes.block
    held = (
        _all_gradients(sizes)
        if last
        else max(_standing_gradients(sizes), _FLOAT32 * sizes.head // layout.shards)
    )
    columns = max(p.out_features for p in sizes.outline.projections if p.style is Style.COLUMN)
    inner = layout.tokens * columns * element // layout.tp_size
    work = 3 * inner + 2 * sizes.whole_stream
    copies = (
        element * _gathered(sizes, layers) + (element + _FLOAT32) * sizes.block
        if layout.is_cut
        else sizes.cast_bytes * sizes.block * layers * (layout.recomputation == "none")
    )
    return _Moment(
        gradients=held,
        activations=layers * sizes.kept_layer() + remade,
        buffers=work + copies,
    )


def _embedding_backward(sizes: LayoutSizes) -> _Moment:
    """The last gradient: rows of the embedding, in float32, beside those that are there."""
    layout, outline = sizes.layout, sizes.outline
    rows = layout.tokens * outline.hidden_size * _FLOAT32
    again = sizes.tied or layout.accumulation > 1 or layout.is_cut
    copies = 0
    if layout.is_cut:
        blocks = sizes.block * outline.num_layers
        copies = (layout.element_bytes + _FLOAT32) * (sizes.local - blocks)
    return _Moment(
        gradients=_all_gradients(sizes),
        buffers=2 * rows + again * _FLOAT32 * sizes.head + copies,
    )
