"""The plans of a recipe's stages, and what they come to together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from argonne.config.recipe import Recipe
from argonne.errors import ConfigError
from argonne.training.layouts import best_layouts, flags_of, run_plan
from argonne.training.plan import (
    LayoutPlan,
    Subject,
    document,
    flops_per_token,
    steps_of,
    tokens_per_step,
)


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage on the layout of the run."""

    name: str
    """"" in a run without stages."""
    what: Subject
    plan: LayoutPlan

    @property
    def steps(self) -> int:
        return steps_of(self.what, self.plan.layout)

    @property
    def tokens(self) -> int:
        return self.steps * tokens_per_step(self.plan.layout)

    @property
    def flops(self) -> float:
        """Of all its tokens, recomputation left out."""
        return self.tokens * flops_per_token(self.what)


@dataclass(frozen=True, kw_only=True)
class CommonLayout:
    """A degree, with or without sequence parallelism and recomputation, that fits in every stage."""

    flags: str
    needed: int
    """Bytes on a device in the stage that needs the most."""
    factor: float
    """Times as fast as the chosen layout over all stages, by the estimate."""


def stage_plans(recipe: Recipe, tokenizer_length: int | None = None) -> list[StagePlan]:
    """One for each stage. Raises ConfigError where the flags ask for no possible layout."""
    plans = []
    for stage in recipe.stages:
        try:
            what, plan = run_plan(stage.config, tokenizer_length)
            steps_of(what, plan.layout)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}" if stage.name else str(error)) from error
        plans.append(StagePlan(name=stage.name, what=what, plan=plan))
    return plans


def largest(plans: Sequence[StagePlan]) -> StagePlan:
    """The stage that needs the most memory, the first of them."""
    return max(plans, key=lambda stage: stage.plan.needed)


def stages_document(plans: Sequence[StagePlan]) -> dict[str, Any]:
    """The keys of ``--plan=json``.

    Of a recipe: steps, tokens and ``fits`` are those of all stages, FLOPs a token their mean, bytes and
    collectives those of the stage that needs the most memory; ``stages`` has each.
    """
    most = largest(plans)
    figures = document(most.what, most.plan)
    if not plans[0].name:
        return figures | targets_figures(most)
    tokens = sum(stage.tokens for stage in plans)
    return figures | {
        "steps": sum(stage.steps for stage in plans),
        "tokens": tokens,
        "flops_per_token": sum(stage.flops for stage in plans) / tokens,
        "fits": all(stage.plan.fits for stage in plans),
        "stages": [_stage_document(stage) for stage in plans],
    }


def targets_figures(stage: StagePlan) -> dict[str, Any]:
    """Keys about a teacher's stored targets; none without them. A run with stages has none."""
    return stage.plan.teacher.figures(stage.tokens // stage.plan.layout.block_size)


def _stage_document(stage: StagePlan) -> dict[str, Any]:
    layout, own = stage.plan.layout, document(stage.what, stage.plan)
    kept = ("steps", "tokens", "flops_per_token", "collectives", "fits")
    return {
        "name": stage.name,
        "block_size": layout.block_size,
        "samples_per_step": layout.batch_size * layout.accumulation * layout.dp_size,
        "bytes_per_rank": asdict(stage.plan.memory),
        **{key: own[key] for key in kept},
    }


def common_layouts(plans: Sequence[StagePlan]) -> list[CommonLayout]:
    """Those that fit in every stage at its global batch, fastest first."""
    seconds = sum(stage.steps * stage.plan.seconds for stage in plans)
    by_stage = []
    for stage in plans:
        found = best_layouts(stage.what, stage.plan.layout)
        by_stage.append({
            (plan.layout.tp_size, plan.layout.sequence_parallel, plan.layout.recomputation): plan
            for plan in found
        })  # fmt: skip
    common = []
    for kind, first in by_stage[0].items():
        if not all(kind in found for found in by_stage):
            continue
        own = [found[kind] for found in by_stage]
        took = sum(stage.steps * plan.seconds for stage, plan in zip(plans, own, strict=True))
        batches = ", then ".join(dict.fromkeys(str(plan.layout.batch_size) for plan in own))
        flags = flags_of(first.layout)
        if len(plans) > 1:  # batches and accumulation are each stage's own
            words = flags.split()
            drop = {at + step for at, word in enumerate(words) if word in _OF_A_STAGE for step in (0, 1)}
            flags = " ".join(word for at, word in enumerate(words) if at not in drop)
            flags += f" (batch size {batches})"
        needed = max(plan.needed for plan in own)
        common.append(CommonLayout(flags=flags, needed=needed, factor=seconds / took))
    return sorted(common, key=lambda layout: -layout.factor)


_OF_A_STAGE = ("--batch-size", "--gradient-accumulation-steps")
