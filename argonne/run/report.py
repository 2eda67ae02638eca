"""What a run prints and records. Rank 0 speaks; on every other rank each call returns at once.

The console never ends a run: a closed stdout, a vanished terminal or a full disk costs
lines, with one warning.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from argonne.files import OutputFolder, write_json
from argonne.run.evaluations import ValidationFile, ValidationRecord
from argonne.run.metrics import MetricsFile, peak_flops

__all__ = ["RunFacts", "RunReport", "StepRecord", "header_lines", "peak_flops", "shard_line"]


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


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One completed optimizer step."""

    step: int
    """steps completed, this one included"""
    loss: float
    """mean over the step's tokens"""
    lr: float
    """rate that the update was made with"""
    grad_norm: float
    """global norm before clipping"""
    tokens: int
    """tokens trained on in this step, over all replicas"""
    tokens_processed: int
    """tokens since step 0"""
    step_seconds: float
    data_wait_seconds: float
    """part of the step spent waiting for its tokens"""
    peak_memory_bytes: int
    position: Mapping[str, Any] = field(default_factory=dict)
    """``DataPosition.to_dict()`` after this step"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """further keys of the metrics line"""


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


class RunReport:
    """Console, progress bar, metrics file and statistics of one run.

    Lines and warnings are printed from the start; ``begin`` opens the metrics file and the bar.

    Args:
        output_dir: folder of ``stats/``.
        rank: only 0 prints and writes.
        log_interval: optimizer steps between printed lines.
    """

    def __init__(self, output_dir: Path, *, rank: int, log_interval: int = 50) -> None:
        self.active = rank == 0
        self._output = OutputFolder(output_dir)
        self._log_interval = log_interval
        self.flops_per_token: float | None = None
        self._peak: float | None = None
        self._warnings: Counter[str] = Counter()
        self._started = time.monotonic()
        self._first_step = self._step = 0
        self._last: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._source_losses: dict[str, float] = {}
        """The last loss of each source of a mixture."""
        self._bar: Any = None
        self._metrics: MetricsFile | None = None
        self.evaluations: ValidationFile | None = None
        """on rank 0 after ``begin``"""

    def begin(
        self,
        *,
        first_step: int,
        total_steps: int,
        flops_per_token: float | None = None,
        peak_flops_total: float | None = None,
    ) -> None:
        """The loop is about to start, and ``stats/`` exists.

        Args:
            first_step: optimizer steps completed so far; metrics beyond are replaced.
            total_steps: optimizer steps of the whole schedule.
            flops_per_token: training FLOPs (forward and backward) of one token; None: no ``mfu``.
            peak_flops_total: FLOP/s of all devices together; None: no ``mfu``.
        """
        self.flops_per_token, self._peak = flops_per_token, peak_flops_total
        self._first_step = self._step = first_step
        if self.active:
            self._metrics = MetricsFile(self._output.metrics, first_step, self.warn)
            self.evaluations = ValidationFile(self._output.eval_metrics, first_step, self.warn)
            self._open_bar(first_step, total_steps)

    def _open_bar(self, first_step: int, total_steps: int) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        self._bar = tqdm(
            initial=first_step, total=total_steps, unit="step", dynamic_ncols=True, file=sys.stderr
        )

    def header(self, facts: RunFacts) -> None:
        """Print what this run is."""
        self._facts |= {"model": facts.model, "parameters": facts.parameters}
        self._facts |= {"tp_size": facts.tp_size, "dp_size": facts.dp_size, "precision": facts.precision}
        for line in header_lines(facts):
            self.info(line)

    def note(self, **facts: Any) -> None:
        """Further keys of the statistics files."""
        self._facts |= facts

    def info(self, text: str) -> None:
        """Print one line on stdout, above the bar where there is one."""
        if self.active:
            self._print(text, "stdout")

    def warn(self, text: str, detail: str = "") -> None:
        """Print ``warning: text`` the first time; count further times (``detail`` may differ)."""
        if not self.active:
            return
        self._warnings[text] += 1
        if self._warnings[text] == 1:
            self._print(f"warning: {text}{' ' if detail else ''}{detail}", "stderr")

    def step(self, record: StepRecord) -> None:
        """Record one optimizer step; print its lines where one is due."""
        if not self.active:
            return
        assert self._metrics is not None, "begin comes before the first step"
        line = self._metrics_line(record)
        self._metrics.write(line)
        self._last, self._step = {**line, "data_position": dict(record.position)}, record.step
        self._source_losses |= line.get("loss_by_source", {})
        self._move_bar(record)
        if record.step % self._log_interval == 0:
            places = place_lines(record.position, self._source_losses, line.get("samples_by_source", {}))
            self.info(
                f"Step {record.step} | Loss: {record.loss:.4f} | Tokens: {record.tokens_processed:,}\n"
                f"Current LR: {record.lr:.2e}\n" + "\n".join(places)
            )

    def _metrics_line(self, record: StepRecord) -> dict[str, Any]:
        per_second = record.tokens / record.step_seconds if record.step_seconds > 0 else 0.0
        line: dict[str, Any] = {
            "step": record.step,
            "loss": record.loss,
            "lr": record.lr,
            "grad_norm": record.grad_norm,
            "tokens_processed": record.tokens_processed,
            "step_seconds": record.step_seconds,
            "tokens_per_second": per_second,
            "data_wait_seconds": record.data_wait_seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
        }
        if self.flops_per_token and self._peak:
            line["mfu"] = self.flops_per_token * per_second / self._peak
        if self._first_step and record.step == self._first_step + 1:
            line["resumed"] = True
        return {**line, **record.extra}

    def validation(self, record: ValidationRecord) -> None:
        """Record and print the loss of one validation set."""
        if self.evaluations is not None:
            self.info(self.evaluations.write(record))

    def sample(self, step: int, text: str) -> None:
        """Print a generated text."""
        self.info(f"--- Generated text at step {step} ---\n{text}\n{'-' * 40}")

    def checkpoint_saved(
        self, step: int, path: Path, *, bytes: int, seconds: float, share: float | None = None
    ) -> None:
        """Print a save and write ``stats/current_training_stats_tensor_parallel_step_{step}.json``.

        ``share``: of the time since the save before, or since the start.
        """
        if not self.active:
            return
        of_the_time = "" if share is None else f", {share:.1%} of the time"
        self.info(f"Saved {path} ({bytes / 1e9:.2f} GB in {seconds:.1f} s{of_the_time})")
        details = {"checkpoint": str(path), "checkpoint_bytes": bytes, "checkpoint_seconds": seconds}
        self._write_stats(self._output.current_stats(step), details)

    def finish(self, state: str, reason: str | None = None) -> None:
        """Count the warnings; write ``final_training_stats_tensor_parallel_{timestamp}.json``."""
        if not self.active:
            return
        for text, count in self._warnings.items():
            if count > 1:
                self._print(f"warning: {count} times: {text}", "stderr")
        timestamp = time.strftime("%Y%m%d_%H%M%S")
        self._write_stats(self._output.final_stats(timestamp), {"state": state, "reason": reason})

    def close(self) -> None:
        """Close bar and metrics; calling it again does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        for file in (self._metrics, self.evaluations):
            if file is not None:
                file.close()

    def _write_stats(self, path: Path, details: Mapping[str, Any]) -> None:
        document = {
            **self._facts,
            "step": self._step,
            "steps_this_run": self._step - self._first_step,
            "elapsed_seconds": time.monotonic() - self._started,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **self._last,
            **details,
            "warnings": dict(self._warnings),
        }
        try:
            write_json(path, document)
        except OSError as error:
            self.warn(f"{path} cannot be written ({error.strerror}): training goes on without it")

    def _move_bar(self, record: StepRecord) -> None:
        if self._bar is None:
            return
        try:
            self._bar.set_postfix_str(f"loss {record.loss:.4f}", refresh=False)
            self._bar.update(record.step - self._bar.n)
        except OSError:  # the terminal is gone
            self._bar = None

    def _print(self, text: str, stream_name: str) -> None:
        stream: TextIO | None = getattr(sys, stream_name)
        if stream is None:
            return
        try:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()
        except (OSError, ValueError) as error:
            _silence(stream, stream_name)
            if stream_name == "stdout":
                self.warn(f"stdout cannot be written ({error}): training goes on without it")


def _silence(stream: TextIO, stream_name: str) -> None:
    """Send a stream that broke to nowhere, so that neither the next line nor the exit's flush fails."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        setattr(sys, stream_name, None)
