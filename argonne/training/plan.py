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

from argonne.config.derived import derive_accumulation, derive_steps, width_multiple
from argonne.config.devices import device_bytes
from argonne.config.options import RunConfig
from argonne.config.presets import PRESETS, REFERENCE
from argonne.ranks.world import replicas_of_a_node, resolve_tp_size
from argonne.training.teacher_plan import TeacherCost, teacher_cost
from checkpointing import estimate_checkpoint_bytes, host_copy_bytes
from tp_shard import (
    OUTSIDE_BYTES,
    DeviceRates,
    Layout,
    LayoutSizes,
    ModelOutline,
    RankMemory,
    SplitCost,
    StepPrediction,
    StepTime,
    build_slice_map,
    device_rates,
    rank_memory,
    shape_only,
    tensor_parallel_cost,
    work_imbalance,
)

PUBLISHED_VOCABULARY = 151_665
"""Tokens of Argonne 2.0's tokenizer, where no tokenizer is given."""
RANKS_OF_A_NODE = 8
PROCESS_BYTES = 400_000_000
"""Of a process on a host beside its tensors: Python, torch, transformers; rounded up from those seen."""
REPLICAS = " over replicas"
"""Ends the kinds of collectives that are data parallelism's."""

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
    device: str = ""
    """Name of the device, for its rates; "": --plan-device."""

    @property
    def rates(self) -> DeviceRates:
        """How fast the device is taken to be."""
        return device_rates(self.device or self.config.planning.plan_device)

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
    time: StepTime
    """A prediction of a step at assumed rates; for comparing layouts."""
    traffic: Traffic
    """Kind of collective -> calls and payload bytes of one optimizer step."""
    imbalance: float
    """Multiplications of the slowest rank of a replica over the mean."""
    teacher: TeacherCost
    """Its bytes are among the buffers, its work in ``time``."""

    @property
    def seconds(self) -> float:
        """Predicted of a step."""
        return self.time.total


def subject_of(config: RunConfig, tokenizer_length: int | None = None) -> Subject:
    """What ``--plan`` is asked about."""
    settings = dict(config.model.settings or PRESETS[REFERENCE])
    settings["vocab_size"] = settings.get("vocab_size") or tokenizer_length or PUBLISHED_VOCABULARY
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
    device: str = "",
) -> Subject:
    """For a shape with its vocabulary, on so many ranks of so much memory each."""
    model = shape_only({**PRESETS[REFERENCE], **settings, "head_dim": settings.get("head_dim")})
    return Subject(
        config=config, settings=settings, model=model, world_size=world_size, device_memory=device_memory,
        outline=ModelOutline.of(model, width_multiple(config.parallel, on_gpu=not on_cpu)),
        node_size=node_size, on_cpu=on_cpu, device=device,
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
    samples = config.training.batch_size * derive_accumulation(config.training, dp_size) * dp_size
    return layout_of(
        what, tp_size, config.training.batch_size, samples,
        sequence_parallel=config.parallel.sequence_parallel,
        recomputation=config.parallel.activation_checkpointing,
    )  # fmt: skip


def layout_of(
    what: Subject,
    tp_size: int,
    batch_size: int,
    samples: int,
    *,
    sequence_parallel: bool,
    recomputation: str,
) -> Layout:
    """A layout by its degree, its micro-batch and the sequences of a step; the flags say the rest.

    Gathered weights stay only where --reshard-after-forward is off. Raises ConfigError where hsdp has
    nothing to share within a node.
    """
    options, training = what.config.parallel, what.config.training
    dp_size = what.world_size // tp_size
    fsdp = options.data_parallel != "ddp"
    shard_size = None
    if options.data_parallel == "hsdp":
        shard_size = replicas_of_a_node(tp_size, world_size=what.world_size, node_size=what.local_world_size)
    return Layout(
        tp_size=tp_size, dp_size=dp_size, fsdp=fsdp, shard_size=shard_size,
        keeps_gathered=fsdp and dp_size > 1 and options.reshard_after_forward == "off",
        sequence_parallel=sequence_parallel and tp_size > 1,
        recomputation=recomputation,
        batch_size=batch_size,
        block_size=training.block_size,
        accumulation=samples // (batch_size * dp_size),
        element_bytes=what.element_bytes, loss_chunk_tokens=training.loss_chunk_tokens,
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
    imbalance = work_imbalance(what.outline, what.model, layout.tp_size, layout.block_size)
    needed = memory.total + (0 if what.on_cpu else OUTSIDE_BYTES)
    prediction = StepPrediction(
        what.outline, what.model, layout, what.rates, node_size=what.node_size, imbalance=imbalance,
        teacher_flops=teacher.flops,
    )  # fmt: skip
    return LayoutPlan(
        layout=layout, memory=memory, cost=cost, traffic=_traffic(what, layout, cost), imbalance=imbalance,
        teacher=teacher, needed=needed, fits=needed <= what.device_memory, time=prediction.time(),
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
    if layout.dp_size == 1:
        return total
    total |= _replica_traffic(what, layout, cost.parameters_per_rank)
    return total


def _replica_traffic(what: Subject, layout: Layout, local: int) -> Traffic:
    """DDP reduces all gradients once; FSDP2 gathers weights for each micro-batch and reduces once."""
    layers, element = what.outline.num_layers, layout.element_bytes
    if not layout.is_cut:
        return {f"all_reduce{REPLICAS}": (1, 4 * local)}
    block = LayoutSizes(what.outline, what.model, layout).block
    again = 0 if layout.keeps_gathered else layers
    gathered = local + again * block
    kind = f"{REPLICAS} of a node" if layout.copies > 1 else REPLICAS
    traffic = {
        f"all_gather{kind}": (
            layout.accumulation * (layers + 1 + again), layout.accumulation * element * gathered,
        ),
        f"reduce_scatter{kind}": (layers + 1, 4 * local),
    }  # fmt: skip
    if layout.copies > 1:
        traffic[f"all_reduce{REPLICAS}"] = (layers + 1, 4 * math.ceil(local / layout.shards))
    return traffic


def sending_ranks(kind: str, layout: Layout) -> int:
    """Ranks among which a kind of `Traffic` goes round."""
    if kind.endswith(f"{REPLICAS} of a node"):
        return layout.shards
    if kind.endswith(REPLICAS):
        return layout.copies if layout.is_cut and layout.copies > 1 else layout.dp_size
    return layout.tp_size


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


def tokens_per_step(layout: Layout) -> int:
    """Tokens of one optimizer step over all replicas."""
    return layout.tokens * layout.dp_size * layout.accumulation


def steps_of(what: Subject, layout: Layout) -> int:
    """Optimizer steps of the run: --total-steps, or those that --total-tokens makes."""
    samples = layout.batch_size * layout.dp_size * layout.accumulation
    return derive_steps(what.config.training, samples).total_steps


def host_bytes(what: Subject, layout: Layout) -> dict[str, int]:
    """Memory of the fullest node's host beside what a process takes for itself.

    ``checkpoint_copies``: of saves in the background, pinned, where --async-checkpoint allows them; ``data``:
    the processes that tokenize, on rank 0's node, as many as asked for.
    """
    config = what.config
    copies = 0
    if config.checkpoint.async_checkpoint == "on" or (
        config.checkpoint.async_checkpoint == "auto" and not what.on_cpu
    ):
        whole = build_slice_map(what.model, what.outline.plan, layout.tp_size, what.outline.heads.pad_to)
        slice_map = whole.with_data_parallel(
            layout.dp_size, sharded=layout.fsdp, shard_size=layout.shard_size
        )
        ranks = range(what.world_size)
        copies = max(
            sum(host_copy_bytes(slice_map, rank) for rank in ranks[first : first + what.local_world_size])
            for first in ranks[:: what.local_world_size]
        )
    data = config.data.num_proc * PROCESS_BYTES
    return {"checkpoint_copies": copies, "data": data, "total": copies + data}


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
        "host_bytes_per_node": host_bytes(what, layout),
        "predicted_step_seconds": {**chosen.time.parts(), "total": chosen.seconds},
    } | ({} if chosen.imbalance == 1.0 else {"imbalance": chosen.imbalance})
