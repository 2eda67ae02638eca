"""The stages of a recipe: what each asks for on this layout, and where a run stands among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from argonne.config.derived import derive_accumulation, derive_steps
from argonne.config.flags import flag_fields, flag_names
from argonne.config.options import RunConfig
from argonne.config.recipe import STAGE_GROUPS, Recipe, groups, stage_fields
from argonne.errors import CheckpointError, ConfigError

STAGES_KEY = "stages"
"""Of a checkpoint: what it knows of its recipe."""
NOT_COMPARED = frozenset(
    {
        *("eval_data", "eval_interval", "eval_samples"),
        *("exclude_documents", "num_proc", "data_cache_dir", "skip_bad_shards", "allow_data_change"),
        *("batch_size", "gradient_accumulation_steps", "global_batch_size"),
    }
)
"""What may change in a finished stage, since no weight came of it; the global batch is compared as one."""


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of a recipe on this layout."""

    name: str
    config: RunConfig
    """With its steps derived."""
    samples_per_step: int
    accumulation: int
    reset_optimizer: bool = False

    def settings(self) -> dict[str, Any]:
        """Key -> plain value of all that decides what the stage trains on, and how."""
        values: dict[str, Any] = {}
        for name, owner in groups():
            if owner in STAGE_GROUPS:
                for entry, rules in flag_fields(owner):
                    if entry.name in stage_fields() - NOT_COMPARED:
                        value = getattr(getattr(self.config, name), entry.name)
                        if isinstance(entry.default, bool):  # as the flag is written: --no-packing
                            value = value != entry.default
                        if rules.repeated and len(value) == 1:  # as older checkpoints have it
                            value = value[0]
                        values[flag_names(entry, rules)[0].removeprefix("--")] = _plain(value)
        values["global-batch-size"] = self.samples_per_step
        values["reset-optimizer"] = self.reset_optimizer
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def plan_stages(recipe: Recipe, dp_size: int) -> tuple[PlannedStage, ...]:
    """Every stage with its global batch and its steps; ConfigError where one does not fit ``dp_size``."""
    planned = []
    for stage in recipe.stages:
        training = stage.config.training
        try:
            accumulation = derive_accumulation(training, dp_size)
            samples = training.batch_size * accumulation * dp_size
            training = derive_steps(training, samples)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}" if stage.name else str(error)) from error
        planned.append(
            PlannedStage(
                name=stage.name,
                config=dataclasses.replace(
                    stage.config,
                    training=training,
                    data=dataclasses.replace(stage.config.data, others=bool(stage.name)),
                ),
                samples_per_step=samples,
                accumulation=accumulation,
                reset_optimizer=stage.reset_optimizer,
            )
        )
    return tuple(planned)


@dataclass(eq=False, kw_only=True)
class Stages:
    """The stages of a run, the one it stands in, and the steps at which those so far began.

    Steps are optimizer steps since training began, over all stages.
    """

    planned: Sequence[PlannedStage]
    starts: list[int] = field(default_factory=lambda: [0])
    """First step of each stage that has begun; the last entry is the current one's."""

    @property
    def index(self) -> int:
        """Of the current stage."""
        return len(self.starts) - 1

    @property
    def current(self) -> PlannedStage:
        return self.planned[self.index]

    @property
    def first_step(self) -> int:
        """Steps completed when the current stage began."""
        return self.starts[-1]

    @property
    def last_step(self) -> int:
        """Steps completed when the current stage ends."""
        return self.first_step + self.current.config.training.total_steps

    @property
    def end(self) -> int:
        """Steps completed when the last stage ends."""
        ahead = self.planned[self.index + 1 :]
        return self.last_step + sum(stage.config.training.total_steps for stage in ahead)

    def label(self) -> dict[str, str]:
        """``stage`` for metrics, validation and checkpoints; nothing in a run without stages."""
        return {"stage": self.current.name} if self.current.name else {}

    def describe(self) -> str:
        """The current stage in one line."""
        training = self.current.config.training
        return (
            f"Stage {self.index + 1} of {len(self.planned)}: {self.current.name}, "
            f"steps {self.first_step + 1:,} to {self.last_step:,}, "
            f"{self.current.samples_per_step} sequences of {training.block_size} tokens a step"
        )

    def lasting(self) -> tuple[int, ...]:
        """Steps whose checkpoints are kept for good: the ends of the stages."""
        return (*self.starts[1:], self.last_step) if self.current.name else ()

    def advance(self) -> bool:
        """Go to the next stage; False where the current one is the last."""
        if self.index + 1 == len(self.planned):
            return False
        self.starts.append(self.last_step)
        return True

    def metadata(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` steps keeps; nothing in a run without stages."""
        if not self.current.name:
            return {}
        ends = [*self.starts[1:], self.last_step]
        records = [
            {
                "name": stage.name,
                "first_step": self.starts[number] if number <= self.index else None,
                "finished": number <= self.index and step >= ends[number],
                "settings": stage.settings(),
            }
            for number, stage in enumerate(self.planned)
        ]
        return {**self.label(), STAGES_KEY: records}


def resume_stages(
    planned: Sequence[PlannedStage], metadata: Mapping[str, Any], step: int
) -> tuple[Stages, str | None]:
    """Where a run goes on in its recipe, and a line on what of the recipe changed ahead.

    ``metadata`` is a checkpoint's ({} without one), ``step`` its steps. Raises ConfigError naming stage and
    key where what is finished, or the order up to here, was changed.
    """
    if not planned[0].name:
        return Stages(planned=planned), None
    try:
        saved = [
            (str(record["name"]), record["first_step"], bool(record["finished"]), dict(record["settings"]))
            for record in metadata.get(STAGES_KEY) or ()
        ]
        starts = [int(first) for _, first, _, _ in saved if first is not None]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("the checkpoint's stages cannot be understood: choose another one") from error
    if not saved:
        return Stages(planned=planned, starts=[step]), None
    finished = 0
    for number, (name, first, ended, settings) in enumerate(saved):
        if first is None:
            break
        _check_place(planned, number, name, "is finished" if ended else f"stands at step {step}")
        if ended:
            _check_finished(planned[number], settings)
            finished += 1
    if finished == len(starts) < len(planned):
        starts.append(step)
    ahead = {name: settings for name, _, _, settings in saved[finished:]}
    return Stages(planned=planned, starts=starts), _changes_ahead(planned[finished:], ahead)


def _check_place(planned: Sequence[PlannedStage], number: int, name: str, standing: str) -> None:
    names = [stage.name for stage in planned]
    if number < len(names) and names[number] == name:
        return
    if name not in names:
        raise ConfigError(
            f"stage {name}, which {standing}, is no longer in the recipe (--config): put it back, or start "
            "the new recipe in another --output-dir"
        )
    raise ConfigError(
        f"stage {name}, which {standing}, was stage {number + 1} of the recipe and is now stage "
        f"{names.index(name) + 1}, after {names[number]} (--config): insert and remove stages behind it only"
    )


def _check_finished(stage: PlannedStage, saved: Mapping[str, Any]) -> None:
    changed = _changed(saved, stage.settings())
    if changed:
        raise ConfigError(
            f"stage {stage.name} is finished and was changed in the recipe (--config): {'; '.join(changed)}: "
            "restore it, and make changes in the stages ahead"
        )


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys that differ, with both values; keys that one side does not know are passed over."""
    return [
        f"{key} was {_shown(old[key])}, is {_shown(value)}"
        for key, value in new.items()
        if key in old and old[key] != value
    ]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "not given" if value is None else str(value)[:100]


def _changes_ahead(planned: Sequence[PlannedStage], saved: Mapping[str, Mapping[str, Any]]) -> str | None:
    names = [stage.name for stage in planned]
    changes = [f"{name} is gone" for name in saved if name not in names]
    for stage in planned:
        if stage.name not in saved:
            changes.append(f"{stage.name} is new")
        elif changed := _changed(saved[stage.name], stage.settings()):
            changes.append(f"{stage.name} ({'; '.join(changed)})")
    if not changes and names != list(saved):
        changes.append("their order")
    return f"Changed in the stages ahead: {'; '.join(changes)}" if changes else None
