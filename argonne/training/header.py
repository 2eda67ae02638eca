"""What a run says at its start."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from argonne.config.options import RunConfig
from argonne.files import OutputFolder
from argonne.run.control import RunControl
from argonne.run.report import RunFacts, RunReport, peak_flops
from argonne.training.build import TrainedModel, flops_per_token
from checkpointing import estimate_save, later_checkpoints
from data_stream import OpenedStream


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads a process)"


def introduce(
    config: RunConfig,
    trained: TrainedModel,
    opened: OpenedStream | None,
    samples_per_step: int,
    first_step: int,
    chosen: str,
    control: RunControl,
    report: RunReport,
) -> None:
    """Open the metrics at the run's first step and print the header."""
    control.progress.collectives = trained.tensor_parallel.group.counters
    parallel, training = trained.parallel, config.training
    device = device_name(parallel.device)
    precision = str(trained.dtype).removeprefix("torch.")
    peak = peak_flops(device, training.dtype or ("bf16" if parallel.device.type == "cuda" else "fp32"))
    report.begin(
        first_step=first_step,
        total_steps=training.total_steps,
        flops_per_token=flops_per_token(trained, training.block_size),
        peak_flops_total=None if peak is None else peak * parallel.world_size,
    )
    output_dir = Path(config.output.output_dir)
    save = (
        estimate_save(trained.slice_map, config.checkpoint.checkpoint_interval, output_dir)
        if report.active
        else None
    )
    if save is not None and (grace := control.grace_warning(save.seconds)) is not None:
        report.warn(grace)
    automatic = config.checkpoint.checkpoint_path is None and not config.checkpoint.force_from_scratch
    pretrained = OutputFolder(output_dir).pretrained
    if not automatic and (later := later_checkpoints(pretrained, first_step)) is not None:
        report.warn(later)
    shards = 0 if opened is None else len(opened.shards)
    begins = "" if opened is None else f", from {_place(opened)}"
    options = config.parallel
    extra = {
        label: text
        for label, text in (
            ("Sequence parallel", "on" if options.sequence_parallel else ""),
            ("Recomputation", options.activation_checkpointing),
            ("Compiled", "each block" if options.compile else ""),
        )
        if text not in ("", "none")
    }
    report.header(
        RunFacts(
            model=config.model.model_config or "argonne",
            parameters=trained.slice_map.numel(),
            tp_size=parallel.tp_size,
            dp_size=parallel.dp_size,
            device=device,
            precision=precision,
            batch_size=training.batch_size,
            accumulation=samples_per_step // (training.batch_size * parallel.dp_size),
            block_size=training.block_size,
            data=f"{shards} shards of {config.data.data_glob}{begins}",
            checkpoint=chosen,
            output_dir=str(output_dir.resolve()),
            save_bytes=save.size if save is not None else None,
            save_seconds=save.seconds if save is not None else None,
            save_share=save.share if save is not None else None,
            extra=extra,
        )
    )


def _place(opened: OpenedStream) -> str:
    position = opened.start.position
    if position.sample is not None:
        return f"sample {position.sample} of epoch {position.epoch}"
    return f"{position.file_name} row {position.row} token {position.token_offset}, epoch {position.epoch}"
