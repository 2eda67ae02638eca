"""Distillation: a teacher beside the trained model, or its stored targets, and how its loss is weighted."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from argonne.config.flags import flag, flag_fields, flag_names
from argonne.errors import ConfigError

FLAG = "--teacher-path"
TARGETS_FLAG = "--teacher-targets"
DEVICE_MAPS = ("local", "auto", "tensor-parallel", "cpu")
DIVERGENCES = ("forward", "reverse")
TOP_K = 64
"""Ids that scripts/teacher_targets.py stores of a token, unless told otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """A teacher, and the loss that it takes part in."""

    teacher_path: str | None = flag(
        None,
        "folder of a causal language model to distil from",
        metavar="FOLDER",
        default_text="none",
    )
    teacher_targets: str | None = flag(
        None,
        "folder of a teacher's stored targets (scripts/teacher_targets.py) to distil from",
        metavar="FOLDER",
        default_text="none",
    )
    teacher_device_map: str = flag(
        "local",
        "the teacher: whole on each rank's device, placed by transformers once a node, split over the ranks "
        "of a replica, or in host memory",
        choices=DEVICE_MAPS,
    )
    teacher_dtype: str | None = flag(
        None,
        "dtype of the teacher's weights",
        choices=("fp32", "bf16", "fp16"),
        default_text="the compute dtype",
    )
    distill_alpha: float = flag(
        0.5, "share of the cross entropy in the loss", kind=float, at_least=0, at_most=1
    )
    distill_temperature: float = flag(
        1.0, "temperature of both distributions in the divergence", kind=float, above=0
    )
    distill_divergence: str = flag(
        "forward", "KL(teacher || student), or reverse: KL(student || teacher)", choices=DIVERGENCES
    )

    @property
    def is_on(self) -> bool:
        """Whether there is a teacher, or its stored targets."""
        return self.teacher_path is not None or self.teacher_targets is not None


OF_A_TEACHER_THAT_RUNS = ("teacher_device_map", "teacher_dtype")
"""Fields that mean nothing to stored targets."""


def distillation_problems(options: DistillationOptions, given: Mapping[str, Any]) -> list[str]:
    """Flags about a teacher where there is none, and two teachers; defaults, which a kept configuration
    states, are no problem."""
    if options.teacher_path is not None and options.teacher_targets is not None:
        return [
            f"{TARGETS_FLAG} {options.teacher_targets} contradicts {FLAG} {options.teacher_path}: leave one "
            "out (a teacher runs beside the model, or its targets are read)"
        ]
    if options.teacher_path is not None:
        return []
    asked = {
        field.name: flag_names(field, rules)[0]
        for field, rules in flag_fields(DistillationOptions)
        if field.name in given and given[field.name] != field.default
    }
    if options.teacher_targets is not None:
        return [
            f"{asked[name]} is about a teacher that runs: leave it out with {TARGETS_FLAG}"
            for name in OF_A_TEACHER_THAT_RUNS
            if name in asked
        ]
    return [f"{name} needs a teacher: give {FLAG}, or leave it out" for name in asked.values()]


def check_folder(folder: Path) -> None:
    """ConfigError where a folder cannot hold a model of transformers."""
    if not folder.is_dir():
        raise ConfigError(f"{FLAG} {folder} is no folder: give the folder of a causal language model")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{FLAG} {folder} has no config.json: give a folder in transformers' layout (a checkpoint "
            "becomes one by scripts/export_hf.py)"
        )
