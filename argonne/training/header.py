"""What a run says at its start: the header, and warnings about what it is going to do."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from argonne.config.options import DataOptions, ParallelOptions, RunConfig
from argonne.config.recipe import flag_values
from argonne.files import OutputFolder, json_safe
from argonne.run.lines import RunFacts
from argonne.run.metrics import peak_flops
from argonne.run.processes import Launch
from argonne.run.report import RunReport
from argonne.training.build import TrainedModel, flops_per_token
from argonne.training.faster_layout import faster_line
from argonne.training.saving import SavingMode
from argonne.training.schedule import Schedule
from argonne.training.stages import Stages
from checkpointing import SaveEstimate, estimate_save, later_checkpoints
from data_stream import OpenedStream


def open_metrics(
    report: RunReport, config: RunConfig, trained: TrainedModel, first_step: int, last_step: int
) -> None:
    """Open the metrics at the run's first step, with what turns a step's time into FLOPs used."""
    training, parallel = config.training, trained.parallel
    dtype = training.dtype or ("bf16" if parallel.device.type == "cuda" else "fp32")
    peak = peak_flops(device_name(parallel.device), dtype)
    report.begin(
        first_step=first_step,
        total_steps=last_step,
        flops_per_token=flops_per_token(trained, training.block_size),
        peak_flops_total=None if peak is None else peak * parallel.world_size,
        trackers=config.output.tracker,
        settings=json_safe(flag_values(config)),
    )


def introduce(
    report: RunReport,
    stages: Stages,
    trained: TrainedModel,
    opened: OpenedStream | None,
    launch: Launch,
    first_step: int,
    *,
    start: str,
    saving: SavingMode,
) -> None:
    """Open the metrics, warn of what lies ahead and print the header.

    ``start`` as in `run_facts`; ``saving`` says how checkpoints are written.
    """
    config, samples = stages.current.config, stages.current.samples_per_step
    open_metrics(report, config, trained, first_step, stages.end)
    save = estimated_save(report, config, trained)
    warn_ahead(report, config, launch, save, first_step)
    report.header(
        run_facts(config, trained, opened, samples_per_step=samples, start=start, save=save, saving=saving)
    )


def estimated_save(report: RunReport, config: RunConfig, trained: TrainedModel) -> SaveEstimate | None:
    """Size and time of a checkpoint, on the rank that prints; None elsewhere."""
    if not report.active:
        return None
    interval = config.checkpoint.checkpoint_interval
    return estimate_save(trained.slice_map, interval, Path(config.output.output_dir))


def warn_ahead(
    report: RunReport, config: RunConfig, launch: Launch, save: SaveEstimate | None, first_step: int
) -> None:
    """Warn of saves that torchrun would cut short, and of later checkpoints that this run will overtake."""
    if save is not None and (grace := launch.grace_warning(save.seconds)) is not None:
        report.warn(grace)
    automatic = config.checkpoint.checkpoint_path is None and not config.checkpoint.force_from_scratch
    folder = OutputFolder(Path(config.output.output_dir)).pretrained
    if not automatic and (later := later_checkpoints(folder, first_step)) is not None:
        report.warn(later)


def run_facts(
    config: RunConfig,
    trained: TrainedModel,
    opened: OpenedStream | None,
    *,
    samples_per_step: int,
    start: str,
    save: SaveEstimate | None,
    saving: SavingMode | None = None,
) -> RunFacts:
    """The header's facts; ``start``: where the run starts from, ``saving``: how checkpoints are written."""
    parallel, training = trained.parallel, config.training
    return RunFacts(
        model=config.model.model_config or "argonne",
        parameters=trained.slice_map.numel(),
        tp_size=parallel.tp_size,
        dp_size=parallel.dp_size,
        device=device_name(parallel.device),
        precision=str(trained.dtype).removeprefix("torch."),
        batch_size=training.batch_size,
        accumulation=samples_per_step // (training.batch_size * parallel.dp_size),
        block_size=training.block_size,
        data=data_line(config.data.data_glob, opened),
        checkpoint=start,
        output_dir=str(Path(config.output.output_dir).resolve()),
        save_bytes=save.size if save is not None else None,
        save_seconds=save.seconds if save is not None else None,
        save_share=save.share if save is not None and not (saving and saving.background) else None,
        extra={
            **({"Checkpoints": saving.text} if saving else {}),
            "Schedule": str(Schedule.of(training)),
            **({"Teacher": trained.teacher.text} if trained.teacher is not None else {}),
            **source_lines(config.data, opened),
            **replica_lines(trained),
            **switches(config.parallel),
            **faster_line(config, trained.model.config.to_dict(), parallel),
        },
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or what the CPU is and how many threads a process has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads a process)"


def switches(options: ParallelOptions) -> dict[str, str]:
    """Label -> text of what is on."""
    texts = {
        "Sequence parallel": "on" if options.sequence_parallel else "",
        "Recomputation": options.activation_checkpointing,
        "Compiled": "each block" if options.compile else "",
    }
    return {label: text for label, text in texts.items() if text not in ("", "none")}


def replica_lines(trained: TrainedModel) -> dict[str, str]:
    """Label -> text of what is particular in how replicas share weights."""
    parallel, texts = trained.parallel, {}
    if parallel.hybrid is not None:
        share, copies = parallel.shard_size, parallel.dp_size // parallel.shard_size
        texts["Replicas"] = f"{share} of a node share weights and state, {copies} nodes hold copies (hsdp)"
    if trained.keeps_gathered:
        texts["Gathered weights"] = "kept until the backward pass (reshard after forward off)"
    return texts


def data_line(data_glob: str | Sequence[str], opened: OpenedStream | None) -> str:
    """The shards and where the stream starts; ``opened`` is rank 0's, None elsewhere."""
    glob = data_glob if isinstance(data_glob, str) else " and ".join(data_glob)
    if opened is None:
        return f"0 shards of {glob}"
    if opened.source_names:
        return f"mixture of {len(opened.source_names)} sources, {len(opened.shards)} shards"
    return f"{len(opened.shards)} shards of {glob}, from {opened.start.position.describe()}"


def source_lines(options: DataOptions, opened: OpenedStream | None) -> dict[str, str]:
    """Label -> text of each source of a mixture, and of what changes a source; ``opened`` is rank 0's."""
    texts = {}
    if opened is not None:
        for name, weight, glob in options.data_mix:
            count, place = len(opened.corpora[name]), opened.start.positions[name].describe()
            texts[f"Source {name}"] = f"weight {weight}, {count} shards of {glob}, from {place}"
    if options.shuffle:
        texts["Shuffled"] = "shards, row groups and rows, by --seed"
    if options.holdout is not None:
        texts["Held out"] = f"one document in {options.holdout}"
    return texts
