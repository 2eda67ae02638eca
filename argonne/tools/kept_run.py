"""A run's folder as a tool reads it: its configuration, its kept checkpoints, its records. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from argonne.config.command_line import parse_recipe
from argonne.config.recipe import Recipe
from argonne.errors import CheckpointError, ConfigError, DataError
from argonne.files import OutputFolder, read_json


@dataclass(frozen=True)
class KeptRun:
    """What lies in a run's ``--output-dir``."""

    folder: Path

    @property
    def output(self) -> OutputFolder:
        """Its names."""
        return OutputFolder(self.folder)

    def recipe(self, flags: Sequence[str] = ()) -> Recipe:
        """The run as it was configured last, ``flags`` over that.

        Raises ConfigError where the folder has no configuration, SystemExit for a wrong flag.
        """
        path = self.output.run_config
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is no folder: give the --output-dir of a run")
        if not path.is_file():
            raise ConfigError(f"{path} is missing: give the --output-dir of a run")
        return parse_recipe(["--config", str(path), *flags])

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """Step -> kept checkpoint, ascending; a checkpoint of several parts stands by its first."""
        from checkpointing import find_checkpoints

        folder = self.output.pretrained
        found = find_checkpoints(folder) if folder.is_dir() else []
        return dict(sorted((step, path) for step, path in reversed(found)))

    def kept(self) -> str:
        """The steps of the kept checkpoints in words."""
        return ", ".join(map(str, self.checkpoints)) or "none"

    def checkpoint(self, step: int) -> Path:
        """The kept checkpoint after ``step`` steps; raises CheckpointError naming those that are kept."""
        path = self.checkpoints.get(step)
        if path is None:
            raise CheckpointError(
                f"{self.output.pretrained} keeps no checkpoint of step {step} (--step): kept are "
                f"{self.kept()}"
            )
        return path

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of training_metrics.jsonl; a torn one is passed over. Raises DataError without a file."""
        path = self.output.metrics
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    record = _record_of(line)
                    if record is not None:
                        yield record
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}: give the --output-dir of a run") from error

    @property
    def processes(self) -> int:
        """Of the last launch; 1 where its status is gone."""
        size = (read_json(self.output.status) or {}).get("world_size")
        return size if isinstance(size, int) and size > 0 else 1


def _record_of(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
