"""From one stage of a recipe to the next: its data, its schedule, its batches, around the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from argonne.config.recipe import Recipe
from argonne.ranks.agree import barrier
from argonne.ranks.world import Parallel
from argonne.run.report import RunReport
from argonne.training.build import TrainedModel, flops_per_token
from argonne.training.data_places import places_beside
from argonne.training.optimizer import reset_adam
from argonne.training.setup import check_data_ahead, open_feed, validation_sets
from argonne.training.stages import Stages, plan_stages, resume_stages
from argonne.training.state import Run
from argonne.training.step import TrainingStep


def choose_stage(
    recipe: Recipe, metadata: Mapping[str, Any], step: int, parallel: Parallel, report: RunReport
) -> Stages:
    """Where the run stands in its recipe, by the checkpoint after ``step`` steps; checks what lies ahead."""
    stages, change = resume_stages(plan_stages(recipe, parallel.dp_size), metadata, step)
    if change is not None:
        report.info(change)
    check_data_ahead(stages, parallel)
    return stages


def enter_next_stage(run: Run) -> bool:
    """Go on with the next stage of the recipe; False after the last one. Collective."""
    world, scaler = run.trained.parallel, run.one_step.scaler.state_dict()
    metadata = run.data.metadata(run.config, staged=bool(run.stages.current.name))
    if not run.stages.advance():
        return False
    run.feed.close()
    barrier(world)  # no feed of this group is left on any rank
    run.feed.close()
    stage = run.stages.current
    with run.control.phase("load"):
        run.data.opened, run.feed = open_feed(
            stage.config,
            run.tokenizer,
            metadata,
            run.step,
            stage.samples_per_step,
            run.report,
            world,
            run.settings["vocab_size"],
            new_stage=True,
        )
        run.validation_sets = validation_sets(stage.config, run.tokenizer, world)
    run.data.begin()
    run.spikes.begin_stage()
    judge = run.spikes.judge_of_steps
    run.one_step = TrainingStep(run.trained, stage.config.training, stage.accumulation, judge)
    run.one_step.scaler.load_state_dict(scaler)
    begin_stage(run, metadata)
    return True


def begin_stage(run: Run, metadata: Mapping[str, Any]) -> None:
    """What the first step of a stage needs and a resume within it does not; says the stage in one line."""
    stages, trained = run.stages, run.trained
    run.data.places = places_beside(stages.current.config, metadata)
    run.report.begin_stage(stages.current.name, stages.last_step)
    if not stages.current.name:
        return
    run.report.note(**stages.label())
    run.control.record(**stages.label())
    run.report.info(stages.describe())
    if run.step == stages.first_step and stages.current.reset_optimizer:
        reset_adam(trained.optimizer)
        run.report.info(f"The optimizer begins anew (reset-optimizer of stage {stages.current.name})")
    run.keeper.keep_for_good(stages.lasting())
    raise_context(run.settings, trained, run.config.training.block_size, run.report.info)
    run.report.flops_per_token = flops_per_token(trained, run.config.training.block_size)


def raise_context(
    settings: dict[str, Any], trained: TrainedModel, block_size: int, say: Callable[[str], None]
) -> None:
    """A longer block than the model's context raises it, in checkpoints and exports too."""
    context = settings["max_position_embeddings"]
    if block_size > context:
        settings["max_position_embeddings"] = block_size
        trained.model.config.max_position_embeddings = block_size
        say(f"max_position_embeddings {context} is raised to --block-size {block_size}")
