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
from tp_shard import HeadCounts, padding_text

_REPLICAS_TEXT = {
    "fsdp": "share weights and state (fsdp)",
    "hsdp": "share weights and state within a node, each node has a copy (hsdp)",
    "ddp": "hold all weights and state each (ddp)",
}
_GATHERED_TEXT = {
    "auto": "freed after the forward pass, gathered again (--reshard-after-forward auto)",
    "on": "freed after the forward pass, gathered again",
    "off": "kept until the backward pass (--reshard-after-forward off)",
}


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
    """Warn of what lies ahead and print the header.

    ``start`` as in `run_facts`; ``saving`` says how checkpoints are written.
    """
    config, samples = stages.current.config, stages.current.samples_per_step
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
            **switches(config.parallel, parallel.device.type, replicas=parallel.dp_size),
            **padding_line(trained),
            **faster_line(config, trained.model.config.to_dict(), parallel, device_name(parallel.device)),
        },
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or what the CPU is and how many threads a process has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads a process)"


def switches(options: ParallelOptions, device_type: str = "cuda", *, replicas: int = 1) -> dict[str, str]:
    """Label -> text of what is on, on such a device."""
    fuses = "on" if device_type == "cuda" else "changes nothing on a CPU"
    shared = replicas > 1 and options.data_parallel != "ddp"
    texts = {
        "Replicas": _REPLICAS_TEXT[options.data_parallel] if replicas > 1 else "",
        "Gathered weights": _GATHERED_TEXT[options.reshard_after_forward] if shared else "",
        "Sequence parallel": "on" if options.sequence_parallel else "",
        "Recomputation": options.activation_checkpointing,
        "Compiled": "each block" if options.compile else "",
        "Asynchronous TP": fuses if options.async_tp else "",
    }
    return {label: text for label, text in texts.items() if text not in ("", "none")}


def padding_line(trained: TrainedModel) -> dict[str, str]:
    """Label -> text of widths that are padded for the sake of kernels."""
    state = trained.tensor_parallel
    text = padding_text(state.slice_map, HeadCounts.from_config(trained.model.config, state.pad_to))
    return {"Padded widths": text} if text else {}


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
    if opened is not None and opened.exclusion.rows:
        texts["Excluded"] = excluded_line(opened)
    if options.holdout is not None:
        texts["Held out"] = f"one document in {options.holdout}"
    return texts


def excluded_line(opened: OpenedStream) -> str:
    """How many documents are listed, and how many of them each source has passed over so far."""
    passed = {
        name: getattr(opened.start, "sources", {"": opened.start})[name].counts.excluded_rows
        for name in opened.corpora
    }
    by_source = ", ".join(f"{name} {count}" if name else str(count) for name, count in passed.items())
    count = len(opened.exclusion)
    listed = f"{count} document{'' if count == 1 else 's'}"
    return f"{listed} (--exclude-documents), passed over so far: {by_source}"
