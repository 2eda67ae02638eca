"""Checks of what a run reads and where it writes: tokenizer, shards, checkpoint, plan, disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from argonne.checkpoint.room import write_rate
from argonne.config.options import RunConfig
from argonne.config.recipe import Recipe
from argonne.data.source import SourceOptions
from argonne.data.token_stream import open_shards, source_by_columns
from argonne.errors import CheckpointError, DataError, DeviceError
from argonne.files import OutputFolder
from argonne.ranks.agree import on_rank_0
from argonne.ranks.world import World
from argonne.training.fit import memory_of_a_rank
from argonne.training.layouts import misfit
from argonne.training.plan import Subject, chosen_layout, plan_layout, subject
from argonne.training.setup import Start, choose_start, source_options, tokenizer_on_rank_0, validation_sets
from argonne.training.stage_change import choose_stage
from argonne.training.stages import Stages
from checkpointing import check_room, estimate_checkpoint_bytes, own_checkpoints

if TYPE_CHECKING:
    from argonne.tools.preflight import Preflight

_NO_ANSWER = "this system does not say how much memory is free"


def tokenizer(config: RunConfig, world: World) -> str:
    """It loads, and how many ids it has."""
    _, size = tokenizer_on_rank_0(config, world)
    return f"{size:,} ids"


def corpora(recipe: Recipe) -> Iterator[tuple[str, SourceOptions, str | Sequence[str]]]:
    """(name, options of the stage's data, patterns) of every source of every stage, each once."""
    known = set()
    for stage in recipe.stages:
        # Without its cache of footers: the output folder stays as it is.
        options = replace(source_options(stage.config, 1), cache_dir=None)
        sources: list[tuple[str, str | Sequence[str]]] = [(part.name, part.glob) for part in options.mix]
        for name, glob in sources or [("", options.data_glob)]:
            key = (glob, options.text_column, options.token_column)
            if key not in known:
                known.add(key)
                where = f"stage {stage.name}: " * bool(stage.name) + f"source {name}: " * bool(name)
                yield where, options, glob


def shards(recipe: Recipe, world: World) -> str:
    """Every footer of every source of every stage, on rank 0's host; all that is wrong at once."""

    def read() -> str:
        count = rows = size = skipped = 0
        wrong = []
        for where, options, glob in corpora(recipe):
            try:
                _, found = open_shards(source_by_columns(options, glob) if options.mix else options)
            except DataError as error:
                wrong.append(f"{where}{error}")
                continue
            count += len(found)
            rows += sum(shard.rows for shard in found)
            size += sum(shard.size for shard in found)
            skipped += sum(bool(shard.fault) for shard in found)
        if wrong:
            raise DataError("; ".join(wrong))
        passed = f", {skipped} bad ones skipped (--skip-bad-shards)" if skipped else ""
        return f"{count:,} footers read: {rows:,} rows, {size / 1e9:.2f} GB{passed}"

    return on_rank_0(read, world)


def start(flight: Preflight) -> tuple[Start, str]:
    """Checkpoint, shape, tokenizer against vocabulary, folder of the export: as the run chooses them."""
    found = choose_start(flight.config, flight.control, flight.report, flight.world)
    _, size = tokenizer_on_rank_0(flight.config, flight.world)
    return (
        found,
        f"{found.reason}; {size:,} ids of the tokenizer in a vocabulary of {found.settings['vocab_size']:,}",
    )


def layout(flight: Preflight) -> tuple[Stages, str]:
    """Degrees, and every stage's batch and steps on them; the data of stages ahead is there."""
    begun, parallel = flight.start, flight.parallel
    assert begun is not None and parallel is not None
    stages = choose_stage(flight.recipe, begun.metadata, begun.step, parallel, flight.report)
    left = max(0, stages.end - begun.step)
    batch = stages.current.samples_per_step * stages.current.config.training.block_size
    said = f"tensor parallel {parallel.tp_size} x data parallel {parallel.dp_size}"
    return stages, f"{said}; {batch:,} tokens a step, {left:,} steps to go"


def validation(flight: Preflight) -> str:
    """The sets of every stage ahead are read, tokenized and shared out."""
    stages, begun, parallel = flight.stages, flight.start, flight.parallel
    assert stages is not None and begun is not None and parallel is not None
    done = set()
    for stage in stages.planned[stages.index :]:
        key = (stage.config.evaluation, stage.config.training.block_size, stage.config.training.batch_size)
        if key not in done:
            done.add(key)
            validation_sets(stage.config, begun.tokenizer, parallel)
    names = dict.fromkeys(
        name for stage in stages.planned[stages.index :] for name, _ in stage.config.evaluation.eval_data
    )
    return f"read: {', '.join(names)}" if names else "no sets (--eval-data)"


def subject_of_stage(flight: Preflight, config: RunConfig, device_memory: int) -> Subject:
    """What the plan of one stage is asked about, on the ranks that are here."""
    begun, parallel = flight.start, flight.parallel
    assert begun is not None and parallel is not None
    return subject(
        config, begun.settings, world_size=parallel.world_size, device_memory=device_memory,
        on_cpu=parallel.device.type == "cpu", node_size=parallel.local_world_size,
    )  # fmt: skip


def memory(flight: Preflight) -> str:
    """The plan of every stage ahead against the device, or this host's free memory on a CPU."""
    stages, parallel = flight.stages, flight.parallel
    assert stages is not None and parallel is not None

    def compare() -> str:
        there = memory_of_a_rank(parallel)
        if there is None:
            return _NO_ANSWER
        most = 0
        for stage in stages.planned[stages.index :]:
            what = subject_of_stage(flight, stage.config, there)
            chosen = chosen_layout(what)
            if (problem := misfit(what, chosen)) and not stage.config.planning.ignore_plan:
                raise DeviceError(f"stage {stage.name}: {problem}" if stage.name else problem)
            most = max(most, plan_layout(what, chosen).needed)
        return f"a rank needs about {most / 1e9:.2f} of {there / 1e9:.1f} GB by the plan"

    return on_rank_0(compare, flight.world)


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def disk(flight: Preflight) -> str:
    """Room for the checkpoints that are still to come, and the speed of writing; leaves nothing behind."""
    stages, begun = flight.stages, flight.start
    assert stages is not None and begun is not None

    def measure() -> str:
        output = OutputFolder(flight.output_dir)
        place = nearest_folder(output.pretrained)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{place} cannot be written: mend its permissions or name another --output-dir"
            )
        slices = subject_of_stage(flight, stages.current.config, 0).outline.slice_map
        options = stages.current.config.checkpoint
        check_room(
            slices, place,
            there=len(own_checkpoints(output.pretrained)) if output.pretrained.is_dir() else 0,
            interval=options.checkpoint_interval,
            keep=options.keep_checkpoints + len(stages.planned) - stages.index - 1,
            first_step=begun.step, total_steps=stages.end,
        )  # fmt: skip
        size = estimate_checkpoint_bytes(slices)
        try:
            rate = write_rate(place)
        except OSError as error:
            raise CheckpointError(
                f"{place} took no trial file ({error.strerror}): mend the disk or name another --output-dir"
            ) from error
        return (
            f"{place} takes {rate / 1e6:,.0f} MB/s; {size / 1e9:.2f} GB a checkpoint in {size / rate:.0f} s"
        )

    return on_rank_0(measure, flight.world)
