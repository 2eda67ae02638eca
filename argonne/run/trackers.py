"""Experiment trackers beside the metrics file: TensorBoard, Weights & Biases, trackio.

Each is optional and imported when it is asked for. A tracker that fails during a run is dropped with one
warning: training never waits for a service, and the metrics file has everything.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from argonne.errors import one_line
from argonne.files import OutputFolder, read_json, write_json


class Tracker(Protocol):
    """Takes the numbers of each step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """Event files in ``stats/tensorboard``; what lies beyond the first step is hidden by TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Session:
    """wandb and trackio, which share an interface; a resume goes on with the run of the same id."""

    def __init__(self, module: Any, name: str, output_dir: Path, config: Mapping[str, Any]) -> None:
        self._module = module
        known = output_dir / "stats" / f"tracker_{name}.json"
        saved = read_json(known) or {}
        common = {"project": "argonne", "name": output_dir.resolve().name, "config": dict(config)}
        if name == "wandb":
            run = module.init(id=saved.get("id"), resume="allow", dir=str(output_dir / "stats"), **common)
            write_json(known, {"id": run.id})
        else:
            module.init(resume="allow", **common)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


class Trackers:
    """All trackers of a run, on the rank that reports; ``names`` as ``--tracker`` takes them."""

    def __init__(
        self,
        names: Sequence[str],
        output_dir: Path,
        *,
        first_step: int,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            self._try(name, partial(self._start, name, output_dir, first_step, config))

    def _start(self, name: str, output_dir: Path, first_step: int, config: Mapping[str, Any]) -> None:
        if name == "tensorboard":
            self._open[name] = _TensorBoard(OutputFolder(output_dir).stats / "tensorboard", first_step)
        else:
            self._open[name] = _Session(importlib.import_module(name), name, output_dir, config)

    def log(self, line: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics; nested ones by ``name/key``."""
        values = flattened(line)
        step = int(values.pop("step", 0))
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, step, values))

    def close(self) -> None:
        """Close all; calling it again does nothing."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a service's library may raise anything; the run goes on
            self._open.pop(name, None)
            self._warn(f"--tracker {name} stopped ({one_line(error)[:200]}): the metrics file goes on")


def flattened(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record, those of nested records as ``outer/inner``."""
    values: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            values |= flattened(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            values[f"{prefix}{key}"] = value
    return values
