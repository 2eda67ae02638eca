"""``--plan``: what a run would need and take, worked out without running it.

Everything follows from the shape of the model and the flags; nothing is allocated, no process group is joined
and no file is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from argonne.config.derived import derive_accumulation, derive_steps
from argonne.config.devices import PEAK_FLOPS, device_bytes
from argonne.config.options import RunConfig
from argonne.config.presets import PRESETS, REFERENCE
from argonne.ranks.world import resolve_tp_size
from argonne.training.replica_plan import REPLICAS, ROOM, replica_seconds, replica_traffic, shard_size
from argonne.training.teacher_plan import TeacherCost, teacher_cost
from checkpointing import estimate_checkpoint_bytes
from tp_shard import (
    OUTSIDE_BYTES,
    Layout,
    ModelOutline,
    RankMemory,
    SplitCost,
    fitting_degrees,
    rank_memory,
    sent_share,
    shape_only,
    tensor_parallel_cost,
    work_imbalance,
)

PUBLISHED_VOCABULARY = 151_665
"""Tokens of Argonne 2.0's tokenizer, where no tokenizer is given."""
RANKS_OF_A_NODE = 8
NVLINK = 370e9
"""Bytes a second that a GPU sends within a node; assumed (8 H100s)."""
NETWORK = 50e9
"""Bytes a second that a GPU sends between nodes (400 Gbit/s each); assumed."""
_PRODUCT_SHARE = 0.55
"""Of the peak that products reach; assumed for all layouts."""
_EXTRA_WORK = {"none": 1.0, "selective": 1.08, "full": 4 / 3}
"""Work of a step against that without recomputation: full repeats the forward pass, a third of it."""

Traffic = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model (shapes only) and the flags that a plan is for."""

    config: RunConfig
    settings: Mapping[str, Any]
    model: nn.Module
    outline: ModelOutline
    world_size: int
    device_memory: int
    node_size: int = RANKS_OF_A_NODE
    """Ranks of a node."""
    on_cpu: bool = False
    """Ranks are processes of this host: compute is float32 by default and nothing lies outside."""

    @property
    def local_world_size(self) -> int:
        """Ranks of each node; fewer than a node has are one node."""
        few = self.world_size <= self.node_size
        return self.world_size if few else math.gcd(self.world_size, self.node_size)

    @property
    def element_bytes(self) -> int:
        """Of the compute dtype."""
        dtype = self.config.training.dtype or ("fp32" if self.on_cpu else "bf16")
        return 4 if dtype == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """One layout of a subject."""

    layout: Layout
    memory: RankMemory
    cost: SplitCost
    needed: int
    """Bytes on a device, what lies outside torch's allocator included."""
    fits: bool
    seconds: float
    """Estimate of a step at the assumed rates; for comparing layouts."""
    traffic: Traffic
    """Kind of collective -> calls and payload bytes of one optimizer step."""
    imbalance: float
    """Multiplications of the slowest rank of a replica over the mean."""
    teacher: TeacherCost
    """Its bytes are among the buffers, its work in ``seconds``."""


def subject_of(config: RunConfig, tokenizer_length: int | None = None) -> Subject:
    """What ``--plan`` is asked about."""
    settings = dict(config.model.settings or PRESETS[REFERENCE])
    if settings.get("vocab_size") is None:
        settings["vocab_size"] = tokenizer_length or PUBLISHED_VOCABULARY
    return subject(
        config,
        settings,
        world_size=config.planning.plan_world_size,
        device_memory=device_bytes(config.planning.plan_device),
    )


def subject(
    config: RunConfig,
    settings: Mapping[str, Any],
    *,
    world_size: int,
    device_memory: int,
    node_size: int = RANKS_OF_A_NODE,
    on_cpu: bool = False,
) -> Subject:
    """For a shape with its vocabulary, on so many ranks of so much memory each."""
    model = shape_only({**PRESETS[REFERENCE], **settings, "head_dim": settings.get("head_dim")})
    return Subject(
        config=config, settings=settings, model=model, outline=ModelOutline.of(model), world_size=world_size,
        device_memory=device_memory, node_size=node_size, on_cpu=on_cpu,
    )  # fmt: skip


def chosen_layout(what: Subject) -> Layout:
    """The layout that the flags ask for. Raises ConfigError where there is none."""
    config = what.config
    tp_size = resolve_tp_size(
        config.parallel.tensor_parallel_size,
        world_size=what.world_size,
        local_world_size=what.local_world_size,
        query_heads=what.settings["num_attention_heads"],
    )
    dp_size = what.world_size // tp_size
    return Layout(
        tp_size=tp_size, dp_size=dp_size,
        fsdp=config.parallel.data_parallel != "ddp",
        shard_size=shard_size(config.parallel, tp_size, what.world_size, what.local_world_size),
        keeps_gathered=config.parallel.reshard_after_forward == "off",
        sequence_parallel=config.parallel.sequence_parallel and tp_size > 1,
        recomputation=config.parallel.activation_checkpointing,
        batch_size=config.training.batch_size,
        block_size=config.training.block_size,
        accumulation=derive_accumulation(config.training, dp_size),
        element_bytes=what.element_bytes, loss_chunk_tokens=config.training.loss_chunk_tokens,
    )  # fmt: skip


def flops_per_token(what: Subject) -> float:
    """As ``argonne.training.build.flops_per_token``: 6 N + 6 L s h a, causal attention at half."""
    outline = what.outline
    weights = outline.parameters
    if f"{outline.plan.head}.weight" in outline.slice_map.names:
        weights -= outline.slice_map.numel([f"{outline.plan.embedding}.weight"])
    shape: Any = what.model.config
    width = shape.num_attention_heads * shape.head_dim
    return 6.0 * weights + 6.0 * outline.num_layers * what.config.training.block_size * width


def plan_layout(what: Subject, layout: Layout) -> LayoutPlan:
    """Memory, collectives and time of one layout."""
    memory = rank_memory(what.outline, what.model, layout)
    vocab_size = int(what.settings["vocab_size"])
    teacher = teacher_cost(what.config.distillation, layout, vocab_size, what.local_world_size)
    memory = replace(memory, buffers=memory.buffers + teacher.total, total=memory.total + teacher.total)
    cost = tensor_parallel_cost(
        what.outline,
        what.model,
        layout.tp_size,
        (layout.batch_size, layout.block_size),
        layout.element_bytes,
        sequence_parallel=layout.sequence_parallel,
        loss_in_chunks=layout.loss_chunk_tokens != 0,
    )
    traffic = _traffic(what, layout, cost)
    needed = memory.total + (0 if what.on_cpu else OUTSIDE_BYTES)
    work = flops_per_token(what) * _EXTRA_WORK[layout.recomputation] / what.world_size
    imbalance = work_imbalance(what.outline, what.model, layout.tp_size, layout.block_size)
    flops = work * imbalance * tokens_per_step(layout) + teacher.flops * layout.accumulation
    peak = PEAK_FLOPS.get(what.config.planning.plan_device.upper(), PEAK_FLOPS["H100"])
    computing = flops / (_PRODUCT_SHARE * peak)
    across = NVLINK if what.world_size <= RANKS_OF_A_NODE else NETWORK
    replicas = replica_seconds(traffic, layout, within=NVLINK, across=across)
    exposed = max(0.0, replicas - computing / 2)
    return LayoutPlan(
        layout=layout, memory=memory, cost=cost, traffic=traffic, imbalance=imbalance, teacher=teacher,
        needed=needed, fits=needed <= what.device_memory,
        seconds=computing + _sent(traffic, layout) / NVLINK + exposed,
    )  # fmt: skip


def _traffic(what: Subject, layout: Layout, cost: SplitCost) -> Traffic:
    """Of one optimizer step: of every micro-batch, of the gradients once, and among the replicas."""
    total: Traffic = {}
    if layout.tp_size > 1:
        once = {kind: cost.completing.get(kind, (0, 0)) for kind in cost.step}
        for kind, (count, size) in cost.step.items():
            last = once[kind]
            micro = (count - last[0], size - last[1])
            total[kind] = tuple(layout.accumulation * m + x for m, x in zip(micro, last, strict=True))  # type: ignore[assignment]
    if layout.recomputation == "full" and layout.tp_size > 1:
        for kind, count, size in _recomputed(what, layout):
            before = total.get(kind, (0, 0))
            total[kind] = (before[0] + count, before[1] + size)
    return total | replica_traffic(what.outline, what.model, layout)


def _recomputed(what: Subject, layout: Layout) -> Iterator[tuple[str, int, int]]:
    """Collectives of the blocks' forward pass that full recomputation issues again: all but the last exit of
    a block, whose product ends what is needed."""
    seq_len = math.ceil(layout.block_size / layout.tp_size) * layout.tp_size
    size = layout.batch_size * seq_len * what.outline.hidden_size * layout.element_bytes
    layers = layout.accumulation * what.outline.num_layers
    if layout.sequence_parallel:
        yield "all_gather", 2 * layers, 2 * layers * size
        yield "reduce_scatter", layers, layers * size
    else:
        yield "all_reduce", layers, layers * size


def _sent(traffic: Traffic, layout: Layout) -> float:
    """Bytes that a rank sends within a replica, by ring algorithms."""
    inside = {kind: size for kind, (_, size) in traffic.items() if REPLICAS not in kind}
    return sum(size * sent_share(kind, layout.tp_size) for kind, size in inside.items())


def other_layouts(what: Subject, layout: Layout) -> Iterator[Layout]:
    """Layouts of the same global batch on the same ranks, those nearest to ``layout`` first.

    More sequences of a step go into accumulation where a replica takes fewer at a time.
    """
    samples = layout.batch_size * layout.accumulation * layout.dp_size
    heads = what.settings["num_attention_heads"]
    degrees = [d for d in fitting_degrees(heads) if what.world_size % d == 0 and d <= what.node_size]
    hybrid = what.config.parallel.data_parallel == "hsdp" and what.world_size > what.local_world_size
    if hybrid:
        degrees = [d for d in degrees if what.local_world_size % d == 0 and d < what.local_world_size]
    for batch in range(layout.batch_size, 0, -1):
        for tp_size in sorted(degrees, key=lambda degree: (degree != layout.tp_size, -degree)):
            dp_size = what.world_size // tp_size
            if samples % (batch * dp_size):
                continue
            for recomputation in ("none", "selective", "full"):
                for sequence in (False, True) if tp_size > 1 else (False,):
                    yield replace(
                        layout, batch_size=batch, tp_size=tp_size, dp_size=dp_size,
                        accumulation=samples // (batch * dp_size), recomputation=recomputation,
                        sequence_parallel=sequence,
                        shard_size=what.local_world_size // tp_size if hybrid else None,
                    )  # fmt: skip


def flags_of(layout: Layout) -> str:
    """The flags that ask for a layout."""
    parts = [f"--tensor-parallel-size {layout.tp_size}", f"--batch-size {layout.batch_size}"]
    if layout.accumulation > 1:
        parts.append(f"--gradient-accumulation-steps {layout.accumulation}")
    if layout.sequence_parallel:
        parts.append("--sequence-parallel")
    if layout.recomputation != "none":
        parts.append(f"--activation-checkpointing {layout.recomputation}")
    return " ".join(parts)


def nearest_that_fits(what: Subject, layout: Layout) -> LayoutPlan | None:
    """The first of `other_layouts` that fits; None: there is none."""
    plans = (plan_layout(what, other) for other in other_layouts(what, layout))
    return next((plan for plan in plans if plan.fits), None)


def best_layouts(what: Subject, layout: Layout) -> list[LayoutPlan]:
    """Those that fit, at the same batch per micro-batch or less, fastest first by the estimate."""
    plans = [plan_layout(what, other) for other in other_layouts(what, layout)]
    by_kind: dict[tuple[int, bool, str], LayoutPlan] = {}
    for plan in plans:  # the largest micro-batch of each kind comes first
        kind = (plan.layout.tp_size, plan.layout.sequence_parallel, plan.layout.recomputation)
        if plan.fits:
            by_kind.setdefault(kind, plan)
    return sorted(by_kind.values(), key=lambda plan: plan.seconds)


def tokens_per_step(layout: Layout) -> int:
    """Tokens of one optimizer step over all replicas."""
    return layout.tokens * layout.dp_size * layout.accumulation


def steps_of(what: Subject, layout: Layout) -> int:
    """Optimizer steps of the run: --total-steps, or those that --total-tokens makes."""
    samples = layout.batch_size * layout.dp_size * layout.accumulation
    return derive_steps(what.config.training, samples).total_steps


def document(what: Subject, chosen: LayoutPlan) -> dict[str, Any]:
    """The keys of ``--plan=json``."""
    layout = chosen.layout
    tokens, steps = tokens_per_step(layout), steps_of(what, layout)
    return {
        "parameters": what.outline.parameters,
        "tensor_parallel_size": layout.tp_size,
        "data_parallel_size": layout.dp_size,
        "parameters_per_rank": chosen.memory.weights // 4,
        "bytes_per_rank": asdict(chosen.memory),
        "collectives": {
            kind: {"calls": count, "bytes": size} for kind, (count, size) in chosen.traffic.items()
        },
        "flops_per_token": flops_per_token(what),
        "steps": steps,
        "tokens": steps * tokens,
        "checkpoint_bytes": estimate_checkpoint_bytes(what.outline.slice_map),
        "device_memory": what.device_memory,
        "fits": chosen.fits,
    } | ({} if chosen.imbalance == 1.0 else {"imbalance": chosen.imbalance})


def misfit(what: Subject, layout: Layout) -> str | None:
    """One line where a layout does not fit, with the nearest that does; None where it fits."""
    plan = plan_layout(what, layout)
    if plan.fits:
        return None
    where = "this host has" if what.on_cpu else "the device has"
    need = f"a rank needs about {plan.needed / 1e9:.1f} GB and {where} {what.device_memory / 1e9:.1f} GB"
    if what.on_cpu:
        need += " free for each"
    nearest = nearest_that_fits(what, layout)
    if nearest is None:
        remedy = "no layout of this batch on these ranks fits; use more ranks, or a smaller --block-size"
    else:
        remedy = f"{flags_of(nearest.layout)} needs {nearest.needed / 1e9:.1f} GB"
    return f"{need} ({flags_of(layout)}): {remedy}; --ignore-plan goes on"


def settled(what: Subject, layout: Layout) -> LayoutPlan:
    """The plan of a layout, with gathered weights kept where --reshard-after-forward auto finds room."""
    plan = plan_layout(what, layout)
    if not layout.is_cut or what.on_cpu or what.config.parallel.reshard_after_forward != "auto":
        return plan
    keeping = plan_layout(what, replace(layout, keeps_gathered=True))
    return keeping if keeping.needed <= ROOM * what.device_memory else plan


def run_plan(config: RunConfig, tokenizer_length: int | None = None) -> tuple[Subject, LayoutPlan]:
    """The plan that ``--plan`` prints. Raises ConfigError where the flags ask for no possible layout."""
    what = subject_of(config, tokenizer_length)
    return what, settled(what, chosen_layout(what))
