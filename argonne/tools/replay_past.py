"""What a run's folder says of a past step and of the way to it, and the recipe that goes that way again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from argonne.config.options import AUTO, DataOptions, RunConfig
from argonne.config.recipe import Recipe
from argonne.config.run_options import NO_CHECKPOINT
from argonne.errors import CheckpointError, ConfigError, DataError
from argonne.files import read_json
from argonne.ranks.world import World
from argonne.tools.kept_run import KeptRun
from argonne.tools.rewinds import WaysBack
from argonne.training.exclusion import kept_list


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a run's folder says of a step and of the way to it; the same on all ranks."""

    step: int
    first: int
    """Steps completed in the checkpoint."""
    checkpoint: str
    records: Mapping[int, Mapping[str, Any]]
    """Of the steps after the checkpoint."""
    passed_over: Mapping[int, int]
    """Step -> batches passed over before it, since the run had gone back from a spike."""
    lists: Mapping[str, Path]
    """The lists of excluded documents that the records name, by their digest."""
    samples_per_step: int | None
    """None where the records do not tell it."""
    tp_size: int | None
    dp_size: int | None


def find_past(run: KeptRun, step: int, block_size: int, *, from_start: bool) -> Past:
    """Read it (rank 0). Raises ConfigError, CheckpointError or DataError, in one line."""
    records = {record["step"]: record for record in run.records()}
    last = max(records, default=0)
    if not 1 <= step <= last:
        raise ConfigError(f"--step {step} was not reached: {run.output.metrics} has the steps 1 to {last}")
    before = [kept for kept in run.checkpoints if kept < step]
    if not before and not from_start:
        raise CheckpointError(
            f"{run.output.pretrained} keeps no checkpoint before step {step} (--step): kept are "
            f"{run.kept()}; --from-start begins with the initial weights"
        )
    first = 0 if from_start else before[-1]
    path = NO_CHECKPOINT if from_start else str(run.checkpoints[first])
    way = {number: records[number] for number in range(first + 1, step + 1) if number in records}
    if len(way) != step - first:
        missing = next(number for number in range(first + 1, step + 1) if number not in way)
        raise DataError(f"{run.output.metrics} lacks step {missing}, on the way to step {step}: restore it")
    counted = records[step - 1]["tokens_processed"] if step - 1 in records else None
    tokens = None if counted is None and step > 1 else way[step]["tokens_processed"] - (counted or 0)
    # The run that did the step wrote the next checkpoint, if it is still kept.
    later = [kept for kept in run.checkpoints if kept >= step]
    layout = read_json(run.output.current_stats(min(later, default=first))) or {}
    back = WaysBack(run.output)
    passed = {number: back.passed_over(record) for number, record in way.items()}
    digests = {str(record["excluded_list"]) for record in way.values() if record.get("excluded_list")}
    return Past(
        step=step,
        first=first,
        checkpoint=path,
        records=way,
        passed_over={number: batches for number, batches in passed.items() if batches},
        lists={digest: kept for digest in digests if (kept := kept_list(run.output, digest)) is not None},
        samples_per_step=None if tokens is None else tokens // block_size,
        tp_size=layout.get("tp_size"),
        dp_size=layout.get("dp_size"),
    )


def replay_recipe(recipe: Recipe, past: Past, run: KeptRun, folder: Path, world: World) -> Recipe:
    """The run's recipe from the checkpoint on, writing into ``folder`` only, on the ranks of ``world``."""
    cache = folder / "cache"
    if world.rank == 0 and not cache.is_dir():
        cache.mkdir(parents=True)
        for held in run.output.cache.glob("tokens-*"):
            (cache / held.name).mkdir()
            for file in held.iterdir():
                if file.name != "lock":
                    os.symlink(file.resolve(), cache / held.name / file.name)
    kept_layout = world.world_size == (past.tp_size or 0) * (past.dp_size or 0)
    stages = []
    for stage in recipe.stages:
        config = stage.config
        training, parallel = config.training, config.parallel
        if training.global_batch_size is None:
            samples = training.batch_size * (training.gradient_accumulation_steps or 1)
            if parallel.tensor_parallel_size == AUTO:  # which counts them per GPU
                samples *= past.tp_size or 1
            training = replace(training, global_batch_size=samples * (past.dp_size or 1))
        training = replace(training, gradient_accumulation_steps=None)
        if not kept_layout and parallel.tensor_parallel_size != AUTO:
            parallel = replace(parallel, tensor_parallel_size=None)
        config = replace(
            config,
            training=training,
            parallel=parallel,
            checkpoint=replace(
                config.checkpoint,
                checkpoint_path=past.checkpoint,
                force_from_scratch=False,
                init_from=config.checkpoint.init_from if past.checkpoint == NO_CHECKPOINT else None,
            ),
            output=replace(config.output, output_dir=str(folder), final_model_dir=None),
            data=_private_cache(config, cache),
        )
        stages.append(replace(stage, config=config))
    return Recipe(stages=tuple(stages))


def _private_cache(config: RunConfig, cache: Path) -> DataOptions:
    """A cache of the replay's own, unless the run names one outside its folder."""
    if config.data.data_cache_dir is not None and not config.data.streaming:
        return config.data
    return replace(config.data, data_cache_dir=str(cache), allow_data_change=False)
