"""Stored targets in a rehearsal: made anew for its small samples, by the teacher that made the real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from argonne.config.distillation import DistillationOptions
from argonne.config.recipe import Recipe
from argonne.ranks.launch import Environment
from argonne.tools.target_making import Asked, make_targets
from data_stream import TargetsFolder


def scaled_distillation(options: DistillationOptions, folder: Path, notes: list[str]) -> DistillationOptions:
    """The options with targets that will be made in ``folder``, or without any where their teacher is not
    here; what differs from the real ones goes into ``notes``."""
    if options.teacher_targets is None:
        return options
    header = TargetsFolder(Path(options.teacher_targets).expanduser()).read_header()
    if not Path(header.teacher_path).expanduser().is_dir():
        notes.append(f"teacher {header.teacher_path} is not here: stored targets are left out")
        return DistillationOptions()
    notes.append(f"targets are made anew for the small samples, by {header.teacher_path}")
    return dataclasses.replace(options, teacher_targets=str(folder / "targets"))


def make_small_targets(real: Recipe, small: Recipe, processes: int) -> str:
    """Store the targets of the rehearsal's samples, as many of each token as the real ones have."""
    distillation, training = small.config.distillation, small.config.training
    assert real.config.distillation.teacher_targets is not None and distillation.teacher_targets is not None
    there = TargetsFolder(Path(real.config.distillation.teacher_targets).expanduser()).read_header()
    asks = dataclasses.replace(distillation, teacher_path=there.teacher_path, teacher_targets=None)
    stage = dataclasses.replace(small.stages[0], config=dataclasses.replace(small.config, distillation=asks))
    degree = small.config.parallel.tensor_parallel_size
    replicas = processes // (degree if isinstance(degree, int) else 1)
    of_step = training.batch_size * (training.gradient_accumulation_steps or 1) * replicas
    asked = Asked(
        folder=Path(distillation.teacher_targets),
        top_k=there.form.top_k,
        dtype=there.form.dtype,
        samples=training.total_steps * of_step,
    )
    return make_targets(Recipe(stages=(stage,)), asked, Environment.read(environ={}))
