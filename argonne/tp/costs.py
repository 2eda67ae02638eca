"""What a split of a model costs: weights and activations per rank, collectives, bytes sent.

Formulas for one optimizer step of one micro-batch under tensor parallelism as it is done here; the other ways
to put the same model on the same ranks are in ``argonne.tp.strategies``. Payload bytes are those of the
unsharded side, as ``argonne.tp.group`` counts them. Bytes sent per rank follow from the ring algorithms
(Thakur, Rabenseifner and Gropp 2005, section 4): an all-reduce of S bytes sends 2 (n - 1) / n S from each of
n ranks, an all-gather or reduce-scatter half of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from argonne.tp.architectures import plan_for
from argonne.tp.copied_gradients import exchanged_elements
from argonne.tp.imbalance import local_features
from argonne.tp.plan import (
    HeadCounts,
    Style,
    TensorParallelPlan,
    Unit,
    build_slice_map,
    stores_transposed,
    summed_parameters,
)
from argonne.tp.shape_only import most_elements, planned_slice_map
from argonne.tp.slices import SliceMap

STATE_BYTES = 16
"""Bytes per parameter at rest: float32 weight, gradient and two Adam moments (ZeRO, Rajbhandari et al. 2020,
section 3.1, without the 16-bit copies)."""
_LOSS_BYTES = 4
MASTER_BYTES = 4
"""Bytes of a gradient where it is summed over ranks: float32."""

Traffic = dict[str, tuple[int, int]]
"""Kind of collective -> (calls, payload bytes)."""

SHARED = "all_reduce of shared heads"
"""The all-reduce over the ranks that hold copies of the same key/value heads."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One linear layer of a block, unsharded."""

    name: str
    out_features: int
    in_features: int
    style: Style
    unit: Unit = Unit.FEATURES


@dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """What the formulas need of a model."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    projections: tuple[Projection, ...]
    """The linear layers of one block."""
    block_parameters: int
    embedding_parameters: int
    """Token embedding (and position embedding, where there is one)."""
    head_parameters: int
    """Final norm and head; the head counts as well where it is tied, since a last stage needs it."""
    parameters: int
    divided: tuple[tuple[int, int], ...]
    """(output features or vocabulary rows, elements of each) of every parameter that a split divides."""
    plan: TensorParallelPlan
    slice_map: SliceMap
    """At degree 1: names and shapes."""
    heads: HeadCounts
    normed: tuple[Projection, ...] = ()
    """Column layers whose outputs norms on heads take: kept for the backward pass as well."""
    output_norms: int = 0
    """Norms of a block on what attention and MLP return (sandwich norms)."""

    @classmethod
    def of(cls, model: nn.Module, pad_to: int = 1) -> ModelOutline:
        """From an unsharded model; meta tensors will do. ``pad_to`` as the split is given it."""
        plan = plan_for(model)
        slice_map = build_slice_map(model, plan, 1)
        modules = dict(model.named_modules())
        projections = []
        for name, module in modules.items():
            rule = plan.rule_for(name)
            if not name.startswith(f"{plan.first_block}.") or rule is None:
                continue
            if rule.style in (Style.COLUMN, Style.ROW):
                out_features, in_features = slice_map.shape(f"{name}.weight")
                if stores_transposed(module):
                    out_features, in_features = in_features, out_features
                projections.append(
                    Projection(
                        name=name.rpartition(".")[2],
                        out_features=out_features,
                        in_features=in_features,
                        style=rule.style,
                        unit=rule.unit,
                    )
                )
        blocks_prefix = plan.first_block.rpartition(".")[0] + "."
        first = [name for name in slice_map.names if name.startswith(f"{plan.first_block}.")]
        outside = [name for name in slice_map.names if not name.startswith(blocks_prefix)]
        end = [name for name in outside if name.startswith((plan.final_norm, plan.head))]
        vocab_size, hidden_size = slice_map.shape(f"{plan.embedding}.weight")
        tied = f"{plan.head}.weight" not in slice_map.names
        return cls(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_layers=len(model.get_submodule(blocks_prefix.rstrip("."))),  # type: ignore[arg-type]
            projections=tuple(projections),
            block_parameters=slice_map.numel(first),
            embedding_parameters=slice_map.numel(name for name in outside if name not in end),
            head_parameters=slice_map.numel(end) + tied * vocab_size * hidden_size,
            parameters=slice_map.numel(),
            divided=tuple(_divided(modules, plan, slice_map)),
            plan=plan,
            slice_map=slice_map,
            heads=HeadCounts.from_config(model.config, pad_to),
            normed=tuple(p for p in projections if _is_normed(p, first, plan)),
            output_norms=max(0, _residual_norms(first, plan) - 2),
        )


def _is_normed(projection: Projection, names: Iterable[str], plan: TensorParallelPlan) -> bool:
    """Whether a block has a norm on the heads that a projection makes: ``q_norm`` for ``q_proj``."""
    letter = projection.name.partition("_")[0]
    modules = (name.rpartition(".")[0] for name in names)
    rules = ((name.rpartition(".")[2], plan.rule_for(name)) for name in modules)
    return any(
        rule is not None and rule.style is Style.SUMMED and leaf.startswith(f"{letter}_norm")
        for leaf, rule in rules
    )


def _residual_norms(names: Iterable[str], plan: TensorParallelPlan) -> int:
    """Norms of one block that lie on the residual stream; each has one weight."""
    rules = (plan.rule_for(name.rpartition(".")[0]) for name in names if name.endswith(".weight"))
    return sum(rule is not None and rule.style is Style.RESIDUAL for rule in rules)


def _divided(
    modules: Mapping[str, nn.Module], plan: TensorParallelPlan, slice_map: SliceMap
) -> Iterator[tuple[int, int]]:
    for name in slice_map.names:
        module_name, _, leaf = name.rpartition(".")
        rule = plan.rule_for(module_name)
        if rule is None or rule.style not in (Style.COLUMN, Style.ROW, Style.VOCABULARY):
            continue
        shape = slice_map.shape(name)
        transposed = leaf == "weight" and stores_transposed(modules[module_name])
        outputs = shape[1] if transposed else shape[0]
        yield outputs, math.prod(shape) // outputs


@dataclass(frozen=True, kw_only=True)
class SplitCost:
    """One way to put a model on ``ranks`` ranks, for a micro-batch of so many tokens."""

    name: str
    ranks: int
    parameters_per_rank: int
    """On the rank that holds the most."""
    activation_bytes: int
    """Kept for the backward pass on the rank that keeps the most: 16-bit, none recomputed, without logits."""
    forward: Traffic
    step: Traffic
    """Forward, backward and what the step adds."""
    waits: str
    """What the ranks wait for, in words."""
    source: str
    remark: str = field(default="")
    completing: Traffic = field(default_factory=dict)
    """What of ``step`` is done once a step, however many micro-batches it has."""
    sharers: int = 1
    """Ranks that hold copies of the same key/value heads."""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and Adam state on the fullest rank."""
        return STATE_BYTES * self.parameters_per_rank

    @property
    def sent_bytes(self) -> int:
        """Bytes each rank sends in a step."""
        ranks = {SHARED: self.sharers}
        return round(
            sum(
                sent_share(kind, ranks.get(kind, self.ranks)) * payload
                for kind, (_, payload) in self.step.items()
            )
        )


def sent_share(kind: str, ranks: int) -> float:
    """The part of a collective's payload bytes that one of ``ranks`` ranks sends."""
    if kind == "send":
        return 1.0
    if kind.startswith("all_to_all"):  # the payload is what all send; on average
        return 1 / ranks
    return (ranks - 1) / ranks * (2 if kind.startswith("all_reduce") else 1)


def calls(traffic: Traffic) -> int:
    """Number of collectives."""
    return sum(count for count, _ in traffic.values())


def payload(traffic: Traffic) -> int:
    """Bytes of all collectives."""
    return sum(size for _, size in traffic.values())


def readable_bytes(count: float) -> str:
    """``1.5 GB``: decimal units, at least two significant digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def activation_bytes(outline: ModelOutline, tokens: int, tp_size: int, *, sequence_parallel: bool) -> int:
    """16-bit activations kept for the backward pass (Korthikanti et al. 2022, section 4, for this block).

    Per token and layer, in elements: the inputs of both norms and what the norms give (4 h), and the inputs
    of sandwich norms (h each); then, divided over the ranks, the outputs of all column layers, twice where
    a norm on heads takes them, and the inputs of the row layers, but for those that the backward pass
    computes again (``argonne.tp.fused``). Once for the model: the final norm's input and the head's (2 h).
    Sequence parallelism divides what is counted in h too.
    """
    remade = () if outline.plan.gated_exit is None else outline.plan.gated_exit.members
    kept = [p for p in outline.projections if p.name not in remade]
    width = outline.hidden_size / (tp_size if sequence_parallel else 1)
    per_layer = (4 + outline.output_norms) * width + local_features(
        outline, [*kept, *outline.normed], tp_size
    )
    return round(2 * tokens * (outline.num_layers * per_layer + 2 * width))


def add_traffic(*parts: Traffic) -> Traffic:
    total: Traffic = {}
    for part in parts:
        for kind, (count, size) in part.items():
            before = total.get(kind, (0, 0))
            total[kind] = (before[0] + count, before[1] + size)
    return total


def tensor_parallel(
    outline: ModelOutline,
    model: nn.Module,
    ranks: int,
    tokens: tuple[int, int],
    element_bytes: int,
    *,
    sequence_parallel: bool = False,
    loss_in_chunks: bool = False,
) -> SplitCost:
    """This suite's split: one entrance and one exit per block half (Shoeybi et al. 2019, section 3).

    ``tokens`` is (batch, seq_len); a sequence that the ranks do not divide is padded where it is scattered.
    With ``loss_in_chunks`` (``argonne.tp.chunked_loss``) the head does not gather its input again.
    """
    batch, seq_len = tokens
    layers, width = outline.num_layers, outline.hidden_size * element_bytes
    plain = batch * seq_len * width
    padded = batch * ranks * math.ceil(seq_len / ranks) * width
    loss: Traffic = {"all_reduce": (2, 3 * batch * seq_len * max(_LOSS_BYTES, element_bytes))}
    if sequence_parallel:
        forward, backward = _sequence_parallel_traffic(
            outline.plan, layers, plain, padded, again=not loss_in_chunks
        )
        name, source = "tensor + sequence parallel", "Korthikanti et al. 2022, section 4"
        waits = "2 a layer each way, re-gathers overlapped"
    else:
        forward = backward = {"all_reduce": (2 * layers + 1, (2 * layers + 1) * plain)}
        name, source = "tensor parallel (here)", "Shoeybi et al. 2019, section 3"
        waits = "2 a layer each way"
    slice_map = planned_slice_map(model, outline.plan, ranks, outline.heads.pad_to)
    summed = summed_parameters(model, outline.plan, sequence_parallel=sequence_parallel)
    completing = _completing_traffic(slice_map, summed, max(MASTER_BYTES, element_bytes))
    return SplitCost(
        name=name,
        ranks=ranks,
        parameters_per_rank=most_elements(slice_map, slice_map.names),
        activation_bytes=activation_bytes(
            outline, batch * seq_len, ranks, sequence_parallel=sequence_parallel
        ),
        forward=add_traffic(forward, loss),
        step=add_traffic(forward, backward, loss, completing),
        completing=completing,
        waits=waits,
        source=source,
        sharers=slice_map.sharers,
    )


def _completing_traffic(slice_map: SliceMap, summed: Iterable[str], gradient_bytes: int) -> Traffic:
    """Once a step: the sums of partial gradients, and of those of copied key/value heads."""
    traffic: Traffic = {}
    if elements := slice_map.numel(summed):
        traffic["all_reduce"] = (1, elements * gradient_bytes)
    if not slice_map.shares_evenly:
        traffic["all_to_all"] = (1, exchanged_elements(slice_map) * gradient_bytes)
    elif slice_map.copied:
        traffic[SHARED] = (1, most_elements(slice_map, slice_map.copied) * gradient_bytes)
    return traffic


def _sequence_parallel_traffic(
    plan: TensorParallelPlan, layers: int, plain: int, padded: int, *, again: bool
) -> tuple[Traffic, Traffic]:
    """Forward and backward. A gather at each entrance, a reduce-scatter at each exit, mirrored backward.

    ``again``: the head, too, gathers its input a second time.
    """
    if plan.seams:
        # The embedding's sum is scattered; column layers keep their slice of the input and gather it again.
        gathers, regathers = 2 * layers + 1, 2 * layers + again
        return (
            {"all_gather": (gathers, gathers * padded), "reduce_scatter": (gathers, gathers * padded)},
            {
                "all_gather": (gathers + regathers, (gathers + regathers) * padded),
                "reduce_scatter": (gathers, gathers * padded),
            },
        )
    # Transformers' own models: the embedding's sum is whole, the sequence is split at the first block.
    return (
        {
            "all_reduce": (1, plain),
            "all_gather": (2 * layers + 1, (2 * layers + 1) * padded),
            "reduce_scatter": (2 * layers, 2 * layers * padded),
        },
        {
            "all_gather": (2 * layers + 2, (2 * layers + 2) * padded),
            "reduce_scatter": (2 * layers + 1, (2 * layers + 1) * padded),
        },
    )
