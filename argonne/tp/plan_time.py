"""The time of an optimizer step, predicted part by part from counts and assumed rates; nothing is timed.

``docs/planning.md`` lists the parts and their assumed rates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from torch import nn

from argonne.tp.costs import ModelOutline, Projection, sent_share
from argonne.tp.device_rates import DeviceRates
from argonne.tp.elementwise import UPDATE_BYTES, elementwise_bytes
from argonne.tp.plan import Style, Unit
from argonne.tp.plan_memory import Layout, LayoutSizes
from argonne.tp.slices import padded_slice_size

_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Of FlashAttention-2's kernels in torch; others are padded up."""
_ALIGNMENT = 16
"""Bytes: a row that is no multiple cannot be read by the tensor memory accelerator (CUDA driver API,
cuTensorMapEncodeTiled: strides are multiples of 16)."""
_MISALIGNED = 2.0
"""Times as long as such products take; assumed."""
_WAITING = 0.005
"""Seconds of a step in which the device waits for the host; assumed."""
_LAST_BUCKET = 25e6
"""Bytes of DDP's last bucket, which nothing hides."""
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank, by part: a prediction."""

    products: float
    misaligned: float
    """Products with local widths whose rows no tensor memory accelerator can read, beyond ``products``."""
    attention: float
    elementwise: float
    """Elementwise ops, copies and reductions, by their bytes."""
    tensor_parallel: float
    """The tensor-parallel collectives that no product hides."""
    replicas: float
    """Likewise of data parallelism."""
    optimizer: float
    """Norm, clipping and AdamW."""
    teacher: float
    waiting: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Part -> seconds."""
        return {part.name: float(getattr(self, part.name)) for part in fields(self)}


@dataclass(frozen=True, kw_only=True)
class _Hidden:
    """Of one micro-batch: a layer's computing, which hides the replicas' collectives."""

    forward: float
    backward: float


class StepPrediction:
    """The parts of one layout's step.

    Args:
        node_size: ranks of a node; a group that reaches beyond one sends over the network.
        imbalance: multiplications of the slowest rank over the mean.
        teacher_flops: of a micro-batch.
    """

    def __init__(
        self,
        outline: ModelOutline,
        model: nn.Module,
        layout: Layout,
        rates: DeviceRates,
        *,
        node_size: int,
        imbalance: float = 1.0,
        teacher_flops: float = 0.0,
    ) -> None:
        self.outline, self.layout, self.rates = outline, layout, rates
        self.sizes = LayoutSizes(outline, model, layout)
        self.node_size, self.imbalance, self.teacher_flops = node_size, imbalance, teacher_flops

    def time(self) -> StepTime:
        """Of an optimizer step: every micro-batch, then what the step does once."""
        micro = self.layout.accumulation
        products = self._products(self._weights())
        return StepTime(
            products=micro * products,
            misaligned=micro * self._misaligned(),
            attention=micro * self._attention(),
            elementwise=micro * self._elementwise,
            tensor_parallel=micro * (self._forward_exposed() + self._backward_exposed()),
            replicas=self._replicas(products),
            optimizer=UPDATE_BYTES * self.sizes.held / self.rates.memory,
            teacher=micro * self.teacher_flops / self._product_rate,
            waiting=_WAITING,
        )

    # ------------------------------------------------------------------ computing

    @property
    def _product_rate(self) -> float:
        return self.rates.products / (2 if self.sizes.wide else 1)

    def _weights(self) -> float:
        """Unsharded weights that multiply, counted as often as a third of a step multiplies with them."""
        weights = float(self.outline.parameters)
        if not self.sizes.tied:
            weights -= self.outline.vocab_size * self.outline.hidden_size
        if self.layout.recomputation == "full":  # forward again, but for the product that ends a block
            again = [p for p in self.outline.projections if p.name != self.outline.projections[-1].name]
            weights += self.outline.num_layers * sum(map(_elements, again)) / 3
        return weights

    def _products(self, weights: float, passes: int = 3) -> float:
        """Seconds of forward and backward products (``passes`` of 2 FLOP a weight and token)."""
        flops = 2 * passes * weights * self.layout.tokens / self.layout.tp_size
        return flops * self.imbalance / self._product_rate

    def _misaligned(self) -> float:
        slow = sum(_elements(p) for p in self.outline.projections if not self._aligned(p))
        recomputed = 4 / 3 if self.layout.recomputation == "full" else 1
        return self._products(slow * self.outline.num_layers) * recomputed * (_MISALIGNED - 1)

    def _aligned(self, projection: Projection) -> bool:
        size, heads = self.layout.tp_size, self.outline.heads
        if projection.unit is Unit.FEATURES:
            whole = projection.out_features if projection.style is Style.COLUMN else projection.in_features
            widths = [padded_slice_size(whole, size, heads.pad_to)]
        else:
            widths = [heads.width(projection.unit, size, rank) for rank in range(size)]
        return all(width * self.layout.element_bytes % _ALIGNMENT == 0 for width in widths)

    def _attention(self) -> float:
        """Causal: half of the positions; backward twice the forward pass, with which recomputation begins."""
        outline, length = self.outline, self.layout.block_size
        head_dim = outline.heads.stored_dim
        padded = next((width for width in _HEAD_DIMS if width >= head_dim), head_dim)
        share, window = 1.0, getattr(self.sizes.config, "local_attention_window", None)
        if window and getattr(self.sizes.config, "interleaved_local_attention", False):
            share = (1 + min(1.0, 2 * window / length)) / 2  # in every other layer
        flops = 6 * outline.num_layers * length * outline.heads.query_heads * padded * share
        flops *= self.layout.tokens / self.layout.tp_size * self.imbalance
        again = 4 / 3 if self.layout.recomputation != "none" else 1
        return flops * again / (self.rates.attention / (2 if self.sizes.wide else 1))

    @cached_property
    def _elementwise(self) -> float:
        return elementwise_bytes(self.sizes) / self.rates.memory

    # ------------------------------------------------------------------ tensor parallelism

    @cached_property
    def _reduction(self) -> float:
        """Seconds of an all-reduce of the residual stream; a gather or a scatter takes half."""
        size = self.layout.tp_size
        rate = self.rates.link if size <= self.node_size else self.rates.network
        return sent_share("all_reduce", size) * self.sizes.whole_stream / rate

    def _forward_exposed(self) -> float:
        """All: products wait for them. Full recomputation issues a layer's again, but for the last exit."""
        layers = self.outline.num_layers
        if self.layout.recomputation != "full":
            return (2 * layers + 1) * self._reduction
        again = 1.5 if self.layout.sequence_parallel else 1.0
        return ((2 + again) * layers + 1) * self._reduction

    def _backward_exposed(self) -> float:
        """An entrance's reduction runs beside the weight gradients of its layers, a second gather beside
        their input gradients; at the exits (sequence parallelism) products wait, and at the head."""
        layers, reduction = self.outline.num_layers, self._reduction
        entrances = [self._entrance(heads=True), self._entrance(heads=False)]
        if not self.layout.sequence_parallel:
            return layers * sum(max(0.0, reduction - beside) for beside in entrances) + reduction
        half = reduction / 2
        return layers * sum(half + 2 * max(0.0, half - beside) for beside in entrances) + reduction

    def _entrance(self, *, heads: bool) -> float:
        """Seconds of the weight gradients (or input gradients) of the layers behind one entrance."""
        columns = [p for p in self.outline.projections if p.style is Style.COLUMN]
        return sum(
            self._products(_elements(p), passes=1) * (1 if self._aligned(p) else _MISALIGNED)
            for p in columns
            if (p.unit is not Unit.FEATURES) == heads
        )

    # ------------------------------------------------------------------ replicas

    def _replicas(self, products: float) -> float:
        layout, layers = self.layout, self.outline.num_layers
        if layout.dp_size == 1:
            return 0.0
        computing = products + self._misaligned() + self._attention() + self._elementwise
        hidden = _Hidden(
            forward=(computing / 3 + self._forward_exposed()) / layers,
            backward=(computing * 2 / 3 + self._backward_exposed()) / layers,
        )
        if layout.is_cut:
            return self._sharded(hidden)
        rate = self._rate(layout.tp_size * layout.dp_size)
        sent = sent_share("all_reduce", layout.dp_size) * _FLOAT32
        last = min(_LAST_BUCKET, _FLOAT32 * self.sizes.local) / _FLOAT32
        return (
            max(0.0, (self.sizes.local - last) * sent / rate - layers * hidden.backward) + last * sent / rate
        )

    def _rate(self, reach: int) -> float:
        """Of a group whose ranks lie within ``reach`` neighbouring ones."""
        return self.rates.link if reach <= self.node_size else self.rates.network

    def _sharded(self, hidden: _Hidden) -> float:
        """FSDP2: the next block is gathered while one computes, its gradients are reduced while the block
        before computes; the first gathers and the last reductions stand alone."""
        layout, sizes, layers = self.layout, self.sizes, self.outline.num_layers
        rest = sizes.local - layers * sizes.block
        share = sent_share("all_gather", layout.shards) / self._rate(layout.tp_size * layout.shards)
        gather = share * layout.element_bytes
        reduce = share * _FLOAT32
        if layout.copies > 1:  # the shard's sum over the nodes
            across = sent_share("all_reduce", layout.copies) * _FLOAT32 / layout.shards
            reduce += across / self._rate(layout.tp_size * layout.dp_size)
        block, between = sizes.block, layers - 1
        forward = gather * (rest + block) + between * max(0.0, gather * block - hidden.forward)
        again = 0.0 if layout.keeps_gathered else gather * block
        backward = between * max(0.0, again - hidden.backward)
        last = between * max(0.0, again + reduce * block - hidden.backward) + reduce * (rest + block)
        micro = layout.accumulation
        return micro * forward + (micro - 1) * backward + last


def _elements(projection: Projection) -> float:
    return float(projection.out_features * projection.in_features)
