"""What a run has recorded, read from its files alone: metrics, validations, status, events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.errors import DataError
from argonne.files import OutputFolder, read_json

AXES = ("step", "tokens", "time")
"""Optimizer steps, tokens trained on, hours of training."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = "_.-=+*#@"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to mark in a picture: a resume, a stage, a skipped step, or a mark of the user's."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """One run; steps ascend."""

    name: str
    steps: tuple[dict[str, Any], ...]
    """Lines of training_metrics.jsonl."""
    validations: tuple[dict[str, Any], ...]
    """Lines of eval_metrics.jsonl."""
    status: dict[str, Any]

    def places(self, axis: str) -> list[float]:
        """The x coordinate of each step."""
        if axis == "step":
            return [float(record["step"]) for record in self.steps]
        if axis == "tokens":
            return [float(record.get("tokens_processed", 0)) for record in self.steps]
        hours, places = 0.0, []
        for record in self.steps:
            hours += float(record.get("step_seconds") or 0.0) / 3600
            places.append(hours)
        return places

    def place_of(self, axis: str) -> Callable[[int], float | None]:
        """A function from a step to its x coordinate (None where the run has no such step)."""
        known = dict(zip((int(record["step"]) for record in self.steps), self.places(axis), strict=True))
        return known.get

    def events(self) -> Iterator[Event]:
        """Resumes, beginnings of stages and skipped steps, in order."""
        stage = self.steps[0].get("stage") if self.steps else None
        for record in self.steps:
            if record.get("resumed"):
                yield Event(step=record["step"], text="resumed")
            if record.get("stage") != stage:
                stage = record.get("stage")
                yield Event(step=record["step"], text=f"stage {stage}")
            if record.get("skipped"):
                yield Event(step=record["step"], text="skipped")

    def sources(self) -> list[str]:
        """Names of the mixture's sources, in the order of their first appearance."""
        return list(
            dict.fromkeys(name for record in self.steps for name in record.get("loss_by_source") or {})
        )

    def sets(self) -> list[str]:
        """Names of the validation sets."""
        return list(dict.fromkeys(str(line["name"]) for line in self.validations))


def read_history(path: Path) -> RunHistory:
    """The history of a run's output folder, or of a metrics file alone.

    Raises DataError where there is no metrics file, where it cannot be understood, or before the first step.
    """
    folder = OutputFolder(path)
    metrics = folder.metrics if path.is_dir() else path
    steps = _read_lines(metrics)
    if not any(record.get("loss") is not None for record in steps):
        raise DataError(f"{metrics} holds no step yet: wait for the run's first step")
    evaluations = metrics.with_name("eval_metrics.jsonl")
    return RunHistory(
        name=path.resolve().name if path.is_dir() else path.stem,
        steps=tuple(steps),
        validations=tuple(_read_lines(evaluations)) if evaluations.exists() else (),
        status=read_json(metrics.with_name("run_status.json")) or {},
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    remedy = "give the --output-dir of a run"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: {remedy}") from error
    # A run that is being written may end in half a line.
    lines = text.split("\n")[:-1] if not text.endswith("\n") else text.splitlines()
    try:
        records = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DataError(f"{path} is not a file of metrics ({error}): {remedy}") from error
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise DataError(f"{path} is not a file of metrics (a line has no step): {remedy}")
    return records


def smoothed(values: Sequence[float], span: float = 10.0) -> list[float]:
    """Exponential mean over about ``span`` values, unbiased at the start (as Adam's moments are)."""
    past = 1.0 - 1.0 / max(1.0, span)
    result: list[float] = []
    mean, weight = 0.0, 0.0
    for value in values:
        mean = past * mean + (1 - past) * value
        weight = past * weight + (1 - past)
        result.append(mean / weight)
    return result


def sparkline(values: Sequence[float], width: int = 60, *, plain: bool = False) -> str:
    """Means of ``width`` equal spans as blocks, the lowest mean being the lowest block."""
    blocks = _PLAIN_BLOCKS if plain else _BLOCKS
    width = min(width, len(values))
    spans = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(span) / len(span) for span in spans]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)
