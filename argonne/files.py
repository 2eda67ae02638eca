"""Files of a run: the names in its output folder, small JSON files that are always whole, durable paths.

Standard library only.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHECKPOINT_NAME = re.compile(r"^tensor_parallel_checkpoint_step_(\d+)\.pth$")


def checkpoint_name(step: int) -> str:
    """The file name of the checkpoint after ``step`` optimizer steps."""
    return f"tensor_parallel_checkpoint_step_{step}.pth"


def checkpoint_step(name: str) -> int | None:
    """The step in a file name of :func:`checkpoint_name`; None for any other name."""
    match = _CHECKPOINT_NAME.match(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class OutputFolder:
    """Every name under a run's ``--output-dir``; makes no file and no folder."""

    root: Path

    @property
    def pretrained(self) -> Path:
        """The folder of checkpoints."""
        return self.root / "pretrained"

    @property
    def stats(self) -> Path:
        """The folder of metrics, status and diagnostics."""
        return self.root / "stats"

    @property
    def cache(self) -> Path:
        """The folder of the token cache and the shard index, unless --data-cache-dir names another."""
        return self.root / "cache"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after ``step`` optimizer steps."""
        return self.pretrained / checkpoint_name(step)

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step."""
        return self.stats / "training_metrics.jsonl"

    @property
    def eval_metrics(self) -> Path:
        """One JSON object per validation and set."""
        return self.stats / "eval_metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object per generated text."""
        return self.stats / "samples.jsonl"

    @property
    def spikes(self) -> Path:
        """One JSON object per spike that was acted upon."""
        return self.stats / "spikes.jsonl"

    @property
    def audits(self) -> Path:
        """One JSON object per audit of a layer."""
        return self.stats / "audit.jsonl"

    @property
    def profile(self) -> Path:
        """The folder of the traces of ``--profile``."""
        return self.stats / "profile"

    @property
    def run_config(self) -> Path:
        """The resolved configuration of the last run here, as a recipe file."""
        return self.stats / "run_config.toml"

    @property
    def status(self) -> Path:
        """How the run stands now."""
        return self.stats / "run_status.json"

    def excluded(self, digest: str) -> Path:
        """A list of excluded documents that a run here had, by its digest in the metrics."""
        return self.stats / "excluded_documents" / f"{digest}.jsonl"

    @property
    def lock(self) -> Path:
        """Held while a run uses the folder."""
        return self.stats / "run.lock"

    def current_stats(self, step: int) -> Path:
        """Totals and timings written with the checkpoint after ``step`` optimizer steps."""
        return self.stats / f"current_training_stats_tensor_parallel_step_{step}.json"

    def newest_current_stats(self) -> Path | None:
        """The :meth:`current_stats` of the latest step, or None where there are none."""
        written = self.stats.glob("current_training_stats_tensor_parallel_step_*.json")
        steps = [int(tail) for path in written if (tail := path.stem.rpartition("_")[2]).isdecimal()]
        return self.current_stats(max(steps)) if steps else None

    def final_stats(self, timestamp: str) -> Path:
        """Totals written when a run ends."""
        return self.stats / f"final_training_stats_tensor_parallel_{timestamp}.json"

    def stack(self, rank: int) -> Path:
        """Python's stacks of a rank that stalled."""
        return self.stats / f"stack_rank_{rank}.txt"

    @property
    def flight_recorder_prefix(self) -> Path:
        """What torch's flight recorder puts before the rank in the names of its dumps."""
        return self.stats / "flight_recorder_rank_"


def json_safe(value: Any) -> Any:
    """The value with NaN and infinities replaced by None, which JSON can hold, and paths by their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a small document so that a reader sees the old one or the new one; raises OSError."""
    write_text(path, json.dumps(json_safe(document), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As :func:`write_json`, for a text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The document, or None where there is none or it cannot be understood."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def synchronize(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json_durably(path: Path, document: dict[str, Any]) -> None:
    """As :func:`write_json`, on one line, and on the disk when it returns."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
