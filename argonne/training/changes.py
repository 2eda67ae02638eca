"""What a resume changes against its checkpoint, a line each with the old value and the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from argonne.config.distillation import DistillationOptions
from argonne.config.options import TrainingOptions
from argonne.training.schedule import Schedule
from checkpointing import CheckpointView

SETTINGS_KEY = "run_settings"
"""Of a checkpoint: the settings of the run that wrote it."""

_SAME_RATE = 0.01
"""Rates that differ by less are one; pipeline scripts may count steps from another end."""


def run_settings(
    options: TrainingOptions,
    distillation: DistillationOptions,
    dtype: torch.dtype,
    samples_per_step: int,
    stored_targets: str | None = None,
    replicas: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, by flag: plain values.

    ``options`` with steps derived; ``stored_targets``: the folder with the name of what is in it;
    ``replicas``: --data-parallel where there are several, since one has nothing to share.
    """
    weighed = {
        "distill_alpha": distillation.distill_alpha,
        "distill_temperature": distillation.distill_temperature,
        "distill_divergence": distillation.distill_divergence,
    }
    taught = {"teacher_dtype": distillation.teacher_dtype or str(dtype).removeprefix("torch.")}
    return {
        "learning_rate": options.learning_rate,
        "min_learning_rate": options.min_learning_rate,
        "lr_schedule": options.lr_schedule,
        "warmup_steps": options.warmup_steps,
        "total_steps": options.total_steps,
        "cooldown_steps": options.cooldown_steps or 0,
        "weight_decay": options.weight_decay,
        "adam_betas": list(options.adam_betas),
        "grad_clip": options.grad_clip,
        "dtype": str(dtype),
        "seed": options.seed,
        "global_batch_size": samples_per_step,
        "block_size": options.block_size,
        **({} if replicas is None else {"data_parallel": replicas}),
        "teacher_path": distillation.teacher_path or "none",
        "teacher_targets": stored_targets or "none",
        **(weighed if distillation.is_on else {}),
        **(taught if distillation.teacher_path is not None else {}),
    }


def saved_settings(view: CheckpointView) -> dict[str, Any]:
    """As far as a checkpoint tells them: all where it keeps them, else what its parts show."""
    metadata = view.metadata
    group = view.param_groups[0] if view.param_groups else {}
    state, scheduler = (metadata.get(key) or {} for key in ("data_state", "scheduler_state_dict"))
    betas, peaks = group.get("betas"), scheduler.get("base_lrs")
    shown = {
        "learning_rate": group.get("initial_lr", peaks[0] if isinstance(peaks, list) and peaks else None),
        "weight_decay": group.get("weight_decay"),
        "adam_betas": list(betas) if isinstance(betas, list | tuple) else None,
        "dtype": metadata.get("model_dtype"),
        "seed": metadata.get("seed"),
        "global_batch_size": metadata.get("global_batch_size"),
        "block_size": state.get("block_size"),
    }
    kept = metadata.get(SETTINGS_KEY)
    if isinstance(kept, dict):
        shown |= kept
    if "samples_per_step" in state:  # the data says these two itself
        del shown["global_batch_size"], shown["block_size"]
    return {key: value for key, value in shown.items() if value is not None}


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs, in the order of ``new``; unknown ones are skipped."""
    return [
        f"Changed since the checkpoint: --{key.replace('_', '-')} was {_text(old[key])}, is {_text(value)}"
        for key, value in new.items()
        if key in old and old[key] != value
    ]


def rate_jump(view: CheckpointView, schedule: Schedule, first_step: int = 0) -> str | None:
    """A line where the rate does not go on from the checkpoint's last one, as its optimizer has it.

    ``first_step``: the one at which the schedule begins.
    """
    last = view.param_groups[0].get("lr") if view.param_groups else None
    step = view.step - first_step
    if not isinstance(last, int | float) or not 0 < step < schedule.total_steps:
        return None
    rate = schedule.rate(step)
    if _alike(rate, last) or _alike(schedule.rate(step - 1), last):
        return None
    jumps = "jumps up" if rate > last else "drops"
    return (
        f"the learning rate {jumps} from {last:.3g} in the checkpoint's last step to {rate:.3g} in the next: "
        f"the schedule is now {schedule}"
    )


def _alike(rate: float, other: float) -> bool:
    return abs(rate - other) <= _SAME_RATE * max(rate, other)


def _text(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix("torch.")[:100]
