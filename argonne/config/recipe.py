"""A recipe: a run as one stage after another, and how layers of flags make each stage's configuration.

Standard library only.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

from argonne.config.flags import flag_fields, flag_names
from argonne.config.options import DataOptions, RunConfig, TrainingOptions
from argonne.config.run_options import EvaluationOptions

STAGE_GROUPS = (DataOptions, TrainingOptions, EvaluationOptions)
WHOLE_RUN = frozenset({"tokenizer_path", "trust_remote_code", "adam_betas", "weight_decay", "seed", "dtype"})
"""Fields of those groups that a stage cannot change."""
ONE_OF = (
    ("total_tokens", "total_steps"),
    ("cooldown_fraction", "cooldown_steps"),
    ("data_mix", "data_glob"),
    ("gradient_accumulation_steps", "global_batch_size"),
    ("force_from_scratch", "checkpoint_path"),
    ("teacher_targets", "teacher_path"),
)
"""Fields that say the same in two ways; a layer that gives one takes back the other of those below."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with data, schedule and batches of its own."""

    config: RunConfig
    name: str = ""
    """"" in a run without stages."""
    reset_optimizer: bool = False
    """Begin with the optimizer's moments and step at zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The stages of a run, one after another; a run without any is one stage without a name."""

    stages: tuple[Stage, ...]

    @property
    def config(self) -> RunConfig:
        """The first stage's; what no stage changes is the same in all."""
        return self.stages[0].config

    def with_model(self, settings: Mapping[str, Any] | None) -> Self:
        """The same for a model of this configuration."""
        stages = []
        for stage in self.stages:
            model = dataclasses.replace(stage.config.model, settings=settings)
            stages.append(dataclasses.replace(stage, config=dataclasses.replace(stage.config, model=model)))
        return dataclasses.replace(self, stages=tuple(stages))


def groups() -> Iterator[tuple[str, type]]:
    """(name, dataclass) of each group of flags in a RunConfig."""
    for field in dataclasses.fields(RunConfig):
        owner: object = field.default_factory
        if isinstance(owner, type) and dataclasses.is_dataclass(owner):
            yield field.name, owner


def stage_fields() -> set[str]:
    """The fields that a ``[[stage]]`` may give."""
    names = {field.name for owner in STAGE_GROUPS for field, _ in flag_fields(owner)}
    return names - WHOLE_RUN


def overlay(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of several layers; later ones win, also where they say the same in another way."""
    merged: dict[str, Any] = {}
    for given in layers:
        for group in ONE_OF:
            if any(name in given for name in group):
                for name in group:
                    merged.pop(name, None)
        if given.get("lr_schedule", "wsd") != "wsd":
            merged.pop("cooldown_steps", None)
            merged.pop("cooldown_fraction", None)
        merged |= given
    return merged


def flag_values(config: RunConfig) -> dict[str, Any]:
    """Flag -> value for every flag that all ranks must share (the local rank and ``--debug`` may differ)."""
    values: dict[str, Any] = {}
    for name, owner in groups():
        for field, rules in flag_fields(owner):
            if field.name != "local_rank":
                values[flag_names(field, rules)[0]] = getattr(getattr(config, name), field.name)
    values["--model-config (content)"] = config.model.settings
    return values


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """As `flag_values`, for every stage."""
    if len(recipe.stages) == 1 and not recipe.stages[0].name:
        return flag_values(recipe.config)
    values: dict[str, Any] = {"the stages": [(stage.name, stage.reset_optimizer) for stage in recipe.stages]}
    for stage in recipe.stages:
        values |= {
            f"{flag} of stage {stage.name}": value for flag, value in flag_values(stage.config).items()
        }
    return values
