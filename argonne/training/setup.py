"""What happens once, before and after the loop: output folder, tokenizer, checkpoint, data, export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from argonne.config.options import RunConfig
from argonne.errors import RunError
from argonne.files import OutputFolder
from argonne.ranks.agree import broadcast_object, on_rank_0, only_on_rank_0
from argonne.ranks.world import World
from argonne.run.control import RunControl
from argonne.run.lock import prepare_output_dir
from argonne.run.report import RunReport
from argonne.run.status import already_ended
from argonne.training.build import TrainedModel, model_settings
from argonne.verification.compare import compare_with_unsharded
from checkpointing import (
    CheckpointView,
    check_room,
    clean_temporary_files,
    export_hf,
    open_chosen,
    own_checkpoints,
    verify_checkpoint,
)
from data_stream import OpenedStream, SourceOptions, StepFeed, load_tokenizer, open_stream

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
    """Tokenizer, checkpoint and shape of the model, the same on all ranks."""
    tokenizer, tokenizer_size = tokenizer_on_rank_0(config, world)
    view, reason, warnings = open_chosen(
        config.checkpoint.checkpoint_path,
        Path(config.output.output_dir),
        force_from_scratch=config.checkpoint.force_from_scratch,
        rank=world.rank,
        control_group=world.control_group,
        written_before=control.written_before,
    )
    for warning in warnings:
        report.warn(warning)
    settings = model_settings(config.model, view, tokenizer_size)
    return Start(tokenizer=tokenizer, view=view, reason=reason, settings=settings)


def source_options(config: RunConfig, samples_per_step: int, vocab_size: int | None = None) -> SourceOptions:
    """What decides the tokens of each step."""
    data, training = config.data, config.training
    cache = data.data_cache_dir or str(OutputFolder(Path(config.output.output_dir)).cache)
    return SourceOptions(
        data_glob=data.data_glob,
        block_size=training.block_size,
        samples_per_step=samples_per_step,
        text_column=data.text_column,
        token_column=data.token_column,
        vocab_size=vocab_size,
        streaming=data.streaming,
        packing=data.packing,
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
    config: RunConfig, start: Start, samples_per_step: int, world: World
) -> OpenedStream | None:
    """Rank 0's source (None elsewhere), at the checkpoint's place; DataError on all ranks."""
    view = start.view
    metadata = view.metadata if view is not None else {}
    return only_on_rank_0(
        lambda: open_stream(
            source_options(config, samples_per_step, start.settings["vocab_size"]),
            start.tokenizer,
            saved_position=metadata.get("data_position"),
            saved_state=metadata.get("data_state"),
            global_step=view.step if view is not None else 0,
        ),
        world,
    )


def open_feed(
    config: RunConfig, start: Start, samples_per_step: int, report: RunReport, world: World
) -> tuple[OpenedStream | None, StepFeed]:
    """Rank 0's source and every rank's feed, which tokenizes the first texts while the model is built."""
    opened = data_on_rank_0(config, start, samples_per_step, world)
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


def check_room_on_rank_0(config: RunConfig, trained: TrainedModel, first_step: int, world: World) -> None:
    """CheckpointError on all ranks where the disk cannot take the run's checkpoints."""
    folder = OutputFolder(Path(config.output.output_dir)).pretrained

    def check() -> None:
        check_room(
            trained.slice_map,
            folder,
            there=len(own_checkpoints(folder)),
            interval=config.checkpoint.checkpoint_interval,
            keep=config.checkpoint.keep_checkpoints,
            first_step=first_step,
            total_steps=config.training.total_steps,
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


def export_if_asked(
    config: RunConfig,
    checkpoint: Path | None,
    settings: Mapping[str, Any],
    world: World,
    control: RunControl,
    report: RunReport,
) -> None:
    """Export the finished run's last checkpoint to --final-model-dir; on rank 0, the others wait."""
    target = config.output.final_model_dir
    if target is None or checkpoint is None:
        return

    def export() -> None:
        export_hf(
            verify_checkpoint(checkpoint),
            dict(settings),
            config.data.tokenizer_path,
            Path(target),
            trust_remote_code=config.data.trust_remote_code,
        )

    with control.phase("export"):
        on_rank_0(export, world)
    report.info(f"Exported the model to {target}")
