"""What happens once, before the loop: output folder, tokenizer, checkpoint, data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from argonne.config.families import read_folder_config
from argonne.config.options import RunConfig
from argonne.config.recipe import Recipe
from argonne.config.recipe_file import recipe_toml
from argonne.errors import DataError, RunError
from argonne.files import OutputFolder, write_text
from argonne.ranks.agree import broadcast_object, on_rank_0, only_on_rank_0
from argonne.ranks.world import Parallel, World
from argonne.run.control import RunControl
from argonne.run.lock import prepare_output_dir
from argonne.run.report import RunReport
from argonne.run.status import already_ended
from argonne.training.build import TrainedModel, build_model, fill_weights, model_settings
from argonne.training.data_places import metadata_for
from argonne.training.exclusion import open_at
from argonne.training.final_model import check_final_model_dir
from argonne.training.model_config import local_attention_line
from argonne.training.stages import Stages
from argonne.training.stored_teacher import open_stored
from argonne.training.teacher import open_teacher
from argonne.training.validation import ValidationSet, load_sets
from argonne.verification.compare import compare_with_unsharded
from checkpointing import (
    CheckpointView,
    InitialWeights,
    check_room,
    clean_temporary_files,
    open_chosen,
    own_checkpoints,
)
from data_stream import (
    MixPart,
    OpenedStream,
    SourceOptions,
    StepFeed,
    check_data,
    load_tokenizer,
    require_listed,
)

VERIFIED_TOKENS = 128
"""Sequence length of --verify-sharding's batch."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with."""

    tokenizer: Any
    """Rank 0's; None elsewhere."""
    view: CheckpointView | None
    """The checkpoint to resume from; None: from scratch."""
    reason: str
    """One line for the console."""
    settings: dict[str, Any]
    """Keyword arguments of ArgonneConfig."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The checkpoint's keys beside weights and optimizer; empty where it gives weights only."""
        if self.view is None or self.view.weights_only:
            return {}
        position = self.view.saved_position
        known = {key: value for key, value in self.view.metadata.items() if key != "data_position"}
        return known if position is None else {**known, "data_position": position}

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        return self.view.step if self.view is not None else 0


def claim_output(control: RunControl, world: World) -> tuple[str, str | None] | None:
    """Make, lock and clean the output folder on rank 0.

    Returns None, or the (state, reason) in which an earlier attempt of this same launch stopped or finished,
    so that a restart has nothing to do. Raises RunError on all ranks where it failed for a reason that lasts,
    and where the folder cannot be used or another run has it.
    """

    output_dir = control.output_dir

    def claim() -> tuple[str, str | None] | None:
        ended = already_ended(output_dir, control.launch)
        if ended is not None and ended["state"] == "failed":
            raise RunError(f"a restart would end the same way, for the first attempt said: {ended['reason']}")
        if ended is not None:
            return str(ended["state"]), ended["reason"]
        prepare_output_dir(output_dir)
        control.claim()
        clean_temporary_files(OutputFolder(output_dir).pretrained)
        return None

    return on_rank_0(claim, world)


def tokenizer_on_rank_0(config: RunConfig, world: World) -> tuple[Any, int]:
    """(tokenizer on rank 0 and None elsewhere, number of ids on every rank)."""
    data = config.data
    tokenizer = only_on_rank_0(lambda: load_tokenizer(data.tokenizer_path, data.trust_remote_code), world)
    size = None
    if tokenizer is not None:
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    return tokenizer, broadcast_object(size, world)


def choose_start(config: RunConfig, control: RunControl, report: RunReport, world: World) -> Start:
    """Tokenizer, checkpoint and shape of the model, the same on all ranks; the export's folder is checked."""
    on_rank_0(lambda: check_final_model_dir(config), world)
    tokenizer, tokenizer_size = tokenizer_on_rank_0(config, world)
    init_from = config.checkpoint.init_from
    view, reason, warnings = open_chosen(
        config.checkpoint.checkpoint_path,
        Path(config.output.output_dir),
        force_from_scratch=config.checkpoint.force_from_scratch,
        rank=world.rank,
        control_group=world.control_group,
        written_before=control.written_before,
        initial=InitialWeights(path=init_from, folder_config=read_folder_config) if init_from else None,
    )
    for warning in warnings:
        report.warn(warning)
    if view is not None and view.step and view.saved_position is None:
        there = "data_position" in view.metadata
        owner = "'s data position belongs to another reader's files" if there else " has no data position"
        report.warn(f"the checkpoint{owner}: the data begins at its start")
    settings = model_settings(config.model, view, tokenizer_size)
    if (line := local_attention_line(settings)) is not None:
        report.info(line)
    if config.training.block_size > settings["max_position_embeddings"]:
        was = settings["max_position_embeddings"]
        settings["max_position_embeddings"] = config.training.block_size
        report.info(
            f"max_position_embeddings raised from {was} to --block-size {config.training.block_size}: the "
            "checkpoints and the export carry the new context"
        )
    return Start(tokenizer=tokenizer, view=view, reason=reason, settings=settings)


def source_options(config: RunConfig, samples_per_step: int, vocab_size: int | None = None) -> SourceOptions:
    """What decides the tokens of each step."""
    data, training = config.data, config.training
    cache = data.data_cache_dir or str(OutputFolder(Path(config.output.output_dir)).cache)
    return SourceOptions(
        data_glob=data.data_glob,
        mix=tuple(MixPart(*source) for source in data.data_mix),
        block_size=training.block_size,
        samples_per_step=samples_per_step,
        text_column=data.text_column,
        token_column=data.token_column,
        vocab_size=vocab_size,
        streaming=data.streaming,
        packing=data.packing,
        shuffle=data.shuffle,
        holdout=data.holdout,
        exclude=data.exclude_documents,
        exclude_elsewhere=data.others,
        seed=training.seed,
        num_proc=data.num_proc,
        trust_remote_code=data.trust_remote_code,
        skip_bad_shards=data.skip_bad_shards,
        allow_data_change=data.allow_data_change,
        document_attention=data.document_attention,
        cache_dir=Path(cache),
        remote_cache=Path(cache) if data.data_cache_dir else None,
    )


def data_on_rank_0(
    config: RunConfig,
    tokenizer: Any,
    metadata: Mapping[str, Any],
    step: int,
    samples_per_step: int,
    world: World,
    vocab_size: int | None = None,
) -> OpenedStream | None:
    """Rank 0's source (None elsewhere), at the place in ``metadata``; DataError on all ranks."""

    options = source_options(config, samples_per_step, vocab_size)
    return only_on_rank_0(lambda: open_at(options, tokenizer, metadata, step, config), world)


def open_feed(
    config: RunConfig,
    tokenizer: Any,
    metadata: Mapping[str, Any],
    step: int,
    samples_per_step: int,
    report: RunReport,
    world: World,
    vocab_size: int | None = None,
    *,
    new_stage: bool,
) -> tuple[OpenedStream | None, StepFeed]:
    """Rank 0's source and every rank's feed, which tokenizes the first texts while the model is built.

    ``metadata``: of a checkpoint after ``step`` steps, or nothing. ``vocab_size``: the model's.
    ``new_stage``: the stage begins here.
    """
    place = metadata_for(config, metadata, new_stage=new_stage)
    opened = data_on_rank_0(config, tokenizer, place, step, samples_per_step, world, vocab_size)
    for notice in opened.notices if opened is not None else ():
        report.warn(notice)
    feed = StepFeed(
        opened.source if opened is not None else None,
        samples_per_step=samples_per_step,
        block_size=config.training.block_size,
        group=world.feed_group,
        pin_memory=world.device.type == "cuda",
    )
    return opened, feed


def build(config: RunConfig, settings: Mapping[str, Any], parallel: Parallel) -> TrainedModel:
    """The split model of this rank, its slices not yet filled."""
    taught = config.distillation.is_on
    return build_model(settings, config.parallel, config.training, parallel, taught=taught)


def fill(config: RunConfig, trained: TrainedModel, start: Start, report: RunReport) -> None:
    """Draw or load the weights, warning of what the checkpoint lacks, and open the teacher, or its stored
    targets; collective."""
    loaded = fill_weights(trained, start.view, config.training.seed)
    for warning in loaded.warnings if loaded is not None else ():
        report.warn(warning)
    if config.distillation.teacher_targets is not None:
        vocab_size, where = trained.model.config.vocab_size, (start.tokenizer, start.metadata, start.step)
        trained.teacher = open_stored(config, vocab_size, trained.parallel, *where)
        return
    trained.teacher = open_teacher(
        config.distillation,
        trained.model,
        trained.parallel,
        compute_dtype=trained.dtype,
        tokenizer=start.tokenizer,
        tokenizer_path=config.data.tokenizer_path,
        documents=config.data.document_attention,
        trust=config.data.trust_remote_code,
    )


def validation_sets(config: RunConfig, tokenizer: Any, parallel: Parallel) -> tuple[ValidationSet, ...]:
    """What --eval-data names, at the block size of the training; collective, before the first step."""
    return load_sets(
        config.evaluation.eval_data,
        source_options(config, samples_per_step=1),
        tokenizer,
        samples=config.evaluation.eval_samples,
        batch_size=config.training.batch_size,
        parallel=parallel,
    )


def check_data_ahead(stages: Stages, world: World) -> None:
    """DataError on all ranks where a later stage's data, or a validation set of it, is not there."""

    def check() -> None:
        if stages.index == 0 and stages.current.name:  # later, what lies behind may be gone
            require_listed([source_options(one.config, one.samples_per_step) for one in stages.planned])
        for stage in stages.planned[stages.index + 1 :]:
            options = source_options(stage.config, stage.samples_per_step)
            try:
                check_data(options)
                for name, data_glob in stage.config.evaluation.eval_data:
                    check_data(options, held_out=(name, data_glob))
            except DataError as error:
                raise DataError(f"stage {stage.name}: {error}") from error

    on_rank_0(check, world)


def show_configuration(recipe: Recipe, report: RunReport) -> None:
    """Print the resolved configuration with --debug."""
    if recipe.config.debug:
        report.info(recipe_toml(recipe).rstrip())


def keep_configuration(recipe: Recipe, report: RunReport, world: World, *, chosen: str = "") -> None:
    """Write the resolved configuration to ``stats/run_config.toml``, once nothing refuses the run any more.

    Until then the file is that of the run whose metrics and checkpoints lie beside it.
    ``chosen``: the flags that ask for what --tensor-parallel-size auto chose, as a comment.
    """
    text = recipe_toml(recipe)
    if chosen:
        text += f"\n# tensor-parallel-size auto chose: {chosen}\n"
    path = OutputFolder(Path(recipe.config.output.output_dir)).run_config
    if world.rank == 0:
        try:
            write_text(path, text)
        except OSError as error:
            report.warn(f"{path} cannot be written ({error.strerror}): the run goes on without it")


def check_room_on_rank_0(
    config: RunConfig, trained: TrainedModel, stages: Stages, step: int, world: World
) -> None:
    """CheckpointError on all ranks where the disk cannot take the run's checkpoints."""
    folder = OutputFolder(Path(config.output.output_dir)).pretrained

    def check() -> None:
        check_room(
            trained.slice_map,
            folder,
            there=len(own_checkpoints(folder)),
            interval=config.checkpoint.checkpoint_interval,
            keep=config.checkpoint.keep_checkpoints + len(stages.planned) - stages.index - 1,
            first_step=step,
            total_steps=stages.end,
        )

    on_rank_0(check, world)


def verify_if_asked(config: RunConfig, trained: TrainedModel, control: RunControl, report: RunReport) -> None:
    """--verify-sharding: one small batch through the split and the unsharded model; all ranks."""
    if not config.parallel.verify_sharding:
        return
    training, parallel = config.training, trained.parallel
    # A compiled block is made for the training shape; otherwise a short sequence shows as much.
    compiled = config.parallel.compile
    batch = training.batch_size if compiled else 1
    length = training.block_size if compiled else min(training.block_size, VERIFIED_TOKENS)
    generator = torch.Generator().manual_seed(training.seed)
    tokens = torch.randint(trained.model.config.vocab_size, (batch, length + 1), generator=generator)
    documents = None
    if config.data.document_attention:
        documents = torch.randint(4, (batch, length), generator=generator).sort(dim=1).values
    with control.phase("verify"):
        result = compare_with_unsharded(
            trained.model,
            trained.wrapped,
            parallel,
            tokens,
            dtype=trained.dtype,
            document_ids=documents,
        )
    report.info(f"Verified the split: {result.summary()}")
