"""Lines of the console: what a run is, where its data stands, how fast it goes."""

import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the header of a run tells."""

    model: str
    """name or shape of the model"""
    parameters: int
    """parameters of the unsharded model"""
    tp_size: int
    dp_size: int
    device: str
    """device name, such as ``NVIDIA H100 80GB HBM3`` or ``cpu``"""
    precision: str
    batch_size: int
    """sequences per replica and micro-batch"""
    accumulation: int
    """micro-batches per optimizer step"""
    block_size: int
    """tokens per sequence"""
    data: str
    """the shards and where the stream starts"""
    checkpoint: str
    """where the run starts from: a path and its step, or from scratch"""
    output_dir: str
    save_bytes: int | None = None
    """size of one checkpoint"""
    save_seconds: float | None = None
    """estimated time of one save"""
    save_share: float | None = None
    """estimated share of the run's time that saves take, 0 to 1"""
    extra: Mapping[str, str] = field(default_factory=dict)
    """further lines, label -> text"""


def header_lines(facts: RunFacts) -> list[str]:
    """The header of a run, a line per concern."""
    sequences = facts.batch_size * facts.accumulation * facts.dp_size
    tokens = sequences * facts.block_size
    lines = [
        f"Model: {facts.model}, {facts.parameters:,} parameters",
        f"Layout: tensor parallel {facts.tp_size} x data parallel {facts.dp_size} on {facts.device}, "
        f"{facts.precision}",
        f"Batch: {sequences} sequences of {facts.block_size} tokens = {tokens:,} tokens a step "
        f"({facts.batch_size} x {facts.accumulation} accumulated x {facts.dp_size} replicas)",
        f"Data: {facts.data}",
        f"Start: {facts.checkpoint}",
        f"Output: {facts.output_dir}",
    ]
    if facts.save_bytes is not None:
        save = f"Save: {facts.save_bytes / 1e9:.2f} GB a checkpoint"
        if facts.save_seconds is not None:
            save += f", about {facts.save_seconds:.0f} s"
        if facts.save_share is not None:
            save += f", {facts.save_share:.1%} of the time"
        lines.append(save)
    return lines + [f"{label}: {text}" for label, text in facts.extra.items()]


def shard_line(position: Mapping[str, Any]) -> str:
    """``Shard: name | File index: i | Position: row | Chunk: k`` of a data position."""
    name = os.path.basename(str(position.get("file_name") or "none"))
    row = position.get("position_in_file", position.get("row", 0))
    return (
        f"Shard: {name} | File index: {position.get('current_file_idx', 0)} | Position: {row} | "
        f"Chunk: {position.get('chunk_offset', 0)}"
    )


def place_lines(
    position: Mapping[str, Any], losses: Mapping[str, float], samples: Mapping[str, int]
) -> list[str]:
    """Where the data stands: one line, or one for each source of a mixture with its loss and samples."""
    if "sources" not in position:
        return [shard_line(position)]
    lines = []
    for name, place in position["sources"].items():
        loss = f"{losses[name]:.4f}" if name in losses else "none yet"
        lines.append(
            f"Source: {name} | Loss: {loss} | Samples: {samples.get(name, 0):,} | Epoch: {place['epoch']} | "
            f"{shard_line(place)}"
        )
    return lines


class Pace:
    """How long a step takes of late, with what lies between the steps."""

    STEPS = 50

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=self.STEPS)
        """When the last steps ended, on a clock that does not jump."""

    def after(self, step_seconds: float) -> float:
        """A step has ended that took ``step_seconds``: seconds from step to step."""
        self._ends.append(time.monotonic())
        if len(self._ends) == 1:
            return step_seconds
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


def bar_text(line: Mapping[str, Any], *, stage: str, seconds_left: float) -> str:
    """What stands behind the bar: loss, speed, MFU where it is known, and the time left (of the stage)."""
    parts = [f"loss {line['loss']:.4f}", f"{line['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    of_stage = f"{stage} " if stage else ""
    return ", ".join([*parts, f"{of_stage}ETA {clock_text(seconds_left)}"])


def clock_text(seconds: float) -> str:
    """Days, hours, minutes and seconds as a clock shows them."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d " * bool(days) + f"{hour}:{minute:02}:{second:02}"
