"""Layouts of the same global batch on the same ranks: which fit, which is fastest, which a run asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from argonne.config.options import AUTO, RunConfig, TrainingOptions
from argonne.errors import ConfigError
from argonne.training.plan import LayoutPlan, Subject, chosen_layout, layout_of, plan_layout, subject_of
from tp_shard import Layout, fitting_degrees

RECOMPUTATION = ("none", "selective", "full")
"""From the most memory to the least."""
_ROOM = 0.95
"""Of a device's memory, for the plan's error: what fits more narrowly is chosen where nothing else fits."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What all stages of a run share of a layout."""

    tp_size: int
    sequence_parallel: bool
    recomputation: str


def kind_of(layout: Layout) -> Kind:
    """Of a layout."""
    return Kind(
        tp_size=layout.tp_size,
        sequence_parallel=layout.sequence_parallel,
        recomputation=layout.recomputation,
    )


def possible_degrees(what: Subject) -> list[int]:
    """Tensor-parallel degrees that divide a node's ranks and can divide the heads; of hsdp those that leave
    several replicas on a node."""
    local = what.local_world_size
    degrees = [d for d in fitting_degrees(what.settings["num_attention_heads"]) if local % d == 0]
    if what.config.parallel.data_parallel == "hsdp" and what.world_size > local:
        return [degree for degree in degrees if degree < local]
    return degrees


def other_layouts(what: Subject, layout: Layout) -> Iterator[Layout]:
    """Layouts of the same global batch on the same ranks, those nearest to ``layout`` first.

    More sequences of a step go into accumulation where a replica takes fewer at a time.
    """
    samples = layout.batch_size * layout.accumulation * layout.dp_size
    degrees = possible_degrees(what)
    for batch in range(layout.batch_size, 0, -1):
        for tp_size in sorted(degrees, key=lambda degree: (degree != layout.tp_size, -degree)):
            if samples % (batch * (what.world_size // tp_size)):
                continue
            for recomputation in RECOMPUTATION:
                for sequence in (False, True) if tp_size > 1 else (False,):
                    yield layout_of(
                        what, tp_size, batch, samples, sequence_parallel=sequence, recomputation=recomputation
                    )


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


def settled(what: Subject, layout: Layout) -> LayoutPlan:
    """The plan of a layout, with gathered weights kept where --reshard-after-forward auto finds room."""
    plan = plan_layout(what, layout)
    if not layout.is_cut or what.on_cpu or what.config.parallel.reshard_after_forward != AUTO:
        return plan
    keeping = plan_layout(what, replace(layout, keeps_gathered=True))
    return keeping if _roomy(what, keeping) else plan


def _roomy(what: Subject, plan: LayoutPlan) -> bool:
    return plan.needed <= _ROOM * what.device_memory


def nearest_that_fits(what: Subject, layout: Layout) -> LayoutPlan | None:
    """The first of `other_layouts` that fits; None: there is none."""
    plans = (settled(what, other) for other in other_layouts(what, layout))
    return next((plan for plan in plans if plan.fits), None)


def best_layouts(what: Subject, layout: Layout) -> list[LayoutPlan]:
    """Those that fit, at the same batch per micro-batch or less, fastest first by the prediction."""
    by_kind: dict[Kind, LayoutPlan] = {}
    for other in other_layouts(what, layout):  # the largest micro-batch of each kind comes first
        if kind_of(other) not in by_kind and (plan := settled(what, other)).fits:
            by_kind[kind_of(other)] = plan
    return sorted(by_kind.values(), key=lambda plan: plan.seconds)


# ------------------------------------------------------------------ --tensor-parallel-size auto


def samples_of(training: TrainingOptions, world_size: int) -> int:
    """Sequences of a step under --tensor-parallel-size auto: --batch-size counts per GPU, so that they do not
    depend on the layout."""
    if training.global_batch_size is not None:
        return training.global_batch_size
    return training.batch_size * (training.gradient_accumulation_steps or 1) * world_size


def fastest_of_kinds(what: Subject, *, fitting: bool = True) -> dict[Kind, LayoutPlan]:
    """Of each kind its fastest micro-batch that fits, for the step that auto asks for.

    A replica takes at most --batch-size sequences a GPU at a time. Sequence parallelism and recomputation are
    added where they are not asked for, and never taken away. Those with room to spare come before all that
    fit narrowly. Raises ConfigError where no number of replicas divides the global batch.
    """
    samples = samples_of(what.config.training, what.world_size)
    degrees = [d for d in possible_degrees(what) if samples % (what.world_size // d) == 0]
    if not degrees:
        replicas = sorted(what.world_size // degree for degree in possible_degrees(what))
        raise ConfigError(
            f"--global-batch-size {samples} cannot be shared among {' or '.join(map(str, replicas))} "
            f"replicas of {what.world_size} ranks: use a multiple of {min(replicas, default=1)}"
        )
    plans = [plan for degree in degrees for plan in _plans_of(what, degree, samples)]
    roomy = [plan for plan in plans if _roomy(what, plan)]
    found = roomy or [plan for plan in plans if plan.fits or not fitting]
    fastest: dict[Kind, LayoutPlan] = {}
    for plan in found:
        kind = kind_of(plan.layout)
        if kind not in fastest or plan.seconds < fastest[kind].seconds:
            fastest[kind] = plan
    return fastest


def _plans_of(what: Subject, degree: int, samples: int) -> Iterator[LayoutPlan]:
    """Of one degree: each micro-batch, with and without sequence parallelism, with as little recomputation as
    its memory asks for."""
    options, training = what.config.parallel, what.config.training
    of_replica = samples // (what.world_size // degree)
    asked = RECOMPUTATION[RECOMPUTATION.index(options.activation_checkpointing) :]
    sequences = (True,) if options.sequence_parallel else (False, True)
    for batch in range(min(of_replica, training.batch_size * degree), 0, -1):
        if of_replica % batch:
            continue
        for sequence in sequences if degree > 1 else (False,):
            for recomputation in asked:
                layout = layout_of(
                    what, degree, batch, samples, sequence_parallel=sequence, recomputation=recomputation
                )
                plan = settled(what, layout)
                yield plan
                if _roomy(what, plan):
                    break


def least_memory(what: Subject) -> LayoutPlan:
    """Under auto, what comes nearest to fitting."""
    return min(fastest_of_kinds(what, fitting=False).values(), key=lambda plan: plan.needed)


def asked_plan(what: Subject) -> LayoutPlan:
    """The plan of the layout that the flags ask for; under auto the fastest that fits, else the smallest.

    Raises ConfigError where there is none.
    """
    if what.config.parallel.tensor_parallel_size != AUTO:
        return settled(what, chosen_layout(what))
    fastest = fastest_of_kinds(what)
    return min(fastest.values(), key=lambda plan: plan.seconds) if fastest else least_memory(what)


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


def run_plan(config: RunConfig, tokenizer_length: int | None = None) -> tuple[Subject, LayoutPlan]:
    """The plan that ``--plan`` prints. Raises ConfigError where the flags ask for no possible layout."""
    what = subject_of(config, tokenizer_length)
    return what, asked_plan(what)
