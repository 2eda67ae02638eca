"""What a run leaves to the plan: ``--tensor-parallel-size auto`` and ``--reshard-after-forward auto``.

Rank 0 decides, by the smallest memory of any rank, and tells the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from argonne.config.derived import derive_steps
from argonne.config.options import AUTO, RunConfig
from argonne.config.recipe import Recipe
from argonne.errors import DeviceError, RunError
from argonne.ranks.agree import on_rank_0
from argonne.ranks.world import World
from argonne.run.report import RunReport
from argonne.training.fit import smallest_memory
from argonne.training.layouts import (
    fastest_of_kinds,
    flags_of,
    kind_of,
    least_memory,
    samples_of,
    settled,
)
from argonne.training.plan import LayoutPlan, Subject, chosen_layout, subject
from argonne.training.setup import Start

_UNKNOWN_MEMORY = 1 << 62
"""Where a system does not say what is free, everything fits."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A recipe without ``auto``, and what was chosen in words; "": nothing was."""

    recipe: Recipe
    text: str = ""
    flags: str = ""
    """Those that ask for what was chosen, for stats/run_config.toml."""


def resolve_layout(recipe: Recipe, settings: Mapping[str, Any], world: World) -> Choice:
    """The recipe with a layout in place of ``auto``; collective.

    Raises ConfigError on all ranks where the flags ask for no possible layout, and DeviceError where none
    fits (unless --ignore-plan).
    """
    options = recipe.config.parallel
    if options.tensor_parallel_size != AUTO and (
        options.reshard_after_forward != AUTO or world.device.type == "cpu" or world.world_size == 1
    ):
        return Choice(recipe=recipe)
    memory = smallest_memory(world) or _UNKNOWN_MEMORY
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""

    def choose() -> Choice:
        subjects = [
            subject(
                stage.config, settings, world_size=world.world_size, device_memory=memory,
                node_size=world.local_world_size, on_cpu=world.device.type == "cpu", device=device,
            )
            for stage in recipe.stages
        ]  # fmt: skip
        if options.tensor_parallel_size == AUTO:
            return chosen_by_plan(recipe, subjects)
        return _settled_recipe(recipe, subjects)

    return on_rank_0(choose, world)


def choose_layout(recipe: Recipe, start: Start, report: RunReport, world: World) -> Choice:
    """As `resolve_layout`; says what was chosen, and where steps of the checkpoint's run had another size."""
    choice = resolve_layout(recipe, start.settings, world)
    if choice.text:
        report.info(choice.text)
    if change := batch_change(recipe.config, start.metadata, world.world_size):
        report.info(change)
    return choice


def chosen_by_plan(recipe: Recipe, subjects: Sequence[Subject]) -> Choice:
    """Of the kinds of layout that fit in every stage, the one with the least predicted time over all stages.

    Ties go to the kind that comes first: the smallest degree, without sequence parallelism.
    """
    found = [fastest_of_kinds(what) for what in subjects]
    common = [kind for kind in found[0] if all(kind in plans for plans in found)]
    if common:
        times = {kind: _seconds(subjects, [plans[kind] for plans in found]) for kind in common}
        plans = [plans[min(common, key=lambda kind: times[kind])] for plans in found]
    else:
        plans = _least(subjects)
    keeping = all(plan.layout.keeps_gathered for plan in plans)
    stages = tuple(
        replace(stage, config=_with_layout(stage.config, plan, what.world_size, keeping=keeping))
        for stage, plan, what in zip(recipe.stages, plans, subjects, strict=True)
    )
    first = plans[0]
    return Choice(
        recipe=replace(recipe, stages=stages),
        text=_sentence(subjects[0], first, samples_of(subjects[0].config.training, subjects[0].world_size)),
        flags=flags_of(first.layout),
    )


def _least(subjects: Sequence[Subject]) -> list[LayoutPlan]:
    """Nothing fits: DeviceError, or with --ignore-plan what needs the least memory."""
    plans = [least_memory(what) for what in subjects]
    worst, what = max(zip(plans, subjects, strict=True), key=lambda pair: pair[0].needed)
    if not what.config.planning.ignore_plan:
        raise DeviceError(
            f"--tensor-parallel-size auto: no layout of {samples_of(what.config.training, what.world_size)} "
            f"sequences of {what.config.training.block_size} tokens on {what.world_size} ranks fits into "
            f"{what.device_memory / 1e9:.1f} GB a rank; the smallest ({flags_of(worst.layout)}) needs "
            f"{worst.needed / 1e9:.1f} GB: use more ranks or a smaller --block-size; --ignore-plan goes on"
        )
    fitting, wanted = [fastest_of_kinds(what, fitting=False) for what in subjects], kind_of(worst.layout)
    if not all(wanted in plans for plans in fitting):
        raise RunError("--tensor-parallel-size auto: no layout serves all stages: give a degree")
    return [plans[wanted] for plans in fitting]


def _seconds(subjects: Sequence[Subject], plans: Sequence[LayoutPlan]) -> float:
    """Predicted of all stages."""
    total = 0.0
    for what, plan in zip(subjects, plans, strict=True):
        samples = samples_of(what.config.training, what.world_size)
        total += derive_steps(what.config.training, samples).total_steps * plan.seconds
    return total


def _with_layout(config: RunConfig, plan: LayoutPlan, world_size: int, *, keeping: bool) -> RunConfig:
    """The flags that ask for what was chosen; the sequences of a step are fixed, whatever the layout."""
    layout, asked = plan.layout, config.parallel.reshard_after_forward
    return replace(
        config,
        training=replace(
            config.training,
            batch_size=layout.batch_size,
            global_batch_size=samples_of(config.training, world_size),
            gradient_accumulation_steps=None,
        ),
        parallel=replace(
            config.parallel,
            tensor_parallel_size=layout.tp_size,
            sequence_parallel=layout.sequence_parallel,
            activation_checkpointing=layout.recomputation,
            reshard_after_forward=("off" if keeping else "on") if asked == AUTO else asked,
        ),
    )


def _sentence(what: Subject, plan: LayoutPlan, samples: int) -> str:
    training, layout = what.config.training, plan.layout
    counted = f"--global-batch-size {samples}"
    if training.global_batch_size is None:
        accumulated = training.gradient_accumulation_steps or 1
        counted = (
            f"--batch-size {training.batch_size} a GPU x {accumulated} accumulated x {what.world_size} GPUs "
            f"= {samples} sequences a step"
        )
    return (
        f"Chosen by --tensor-parallel-size auto: {flags_of(layout)} (data parallel {layout.dp_size}), "
        f"{plan.needed / 1e9:.1f} GB a rank, {1e3 * plan.seconds:,.0f} ms a step by the plan's prediction, "
        f"which nothing here measured; {counted}"
    )


def _settled_recipe(recipe: Recipe, subjects: Sequence[Subject]) -> Choice:
    """--reshard-after-forward alone: off where gathered weights find room in every stage."""
    plans = [settled(what, chosen_layout(what)) for what in subjects]
    value = "off" if all(plan.layout.keeps_gathered for plan in plans) else "on"
    stages = tuple(
        replace(
            stage,
            config=replace(
                stage.config, parallel=replace(stage.config.parallel, reshard_after_forward=value)
            ),
        )
        for stage in recipe.stages
    )
    return Choice(recipe=replace(recipe, stages=stages))


def batch_change(config: RunConfig, metadata: Mapping[str, Any], world_size: int) -> str | None:
    """A line where auto on these ranks takes other steps than the checkpoint's run did."""
    saved = (metadata.get("data_state") or {}).get("samples_per_step")
    samples = samples_of(config.training, world_size)
    automatic = config.parallel.tensor_parallel_size == AUTO and config.training.global_batch_size is None
    if not automatic or not isinstance(saved, int) or saved == samples:
        return None
    return (
        f"--tensor-parallel-size auto counts --batch-size per GPU: a step had {saved} sequences at the "
        f"checkpoint and has {samples} on these ranks; --global-batch-size {saved} keeps it"
    )
