"""What a run prints and records. Rank 0 speaks; on every other rank each call returns at once."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argonne.files import OutputFolder, write_json
from argonne.run.console import Console
from argonne.run.evaluations import ValidationRecord
from argonne.run.lines import Pace, RunFacts, bar_text, header_lines, place_lines
from argonne.run.metrics import LaterFile, MetricsFile
from argonne.run.trackers import Trackers


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
    checkpoint_seconds: float = 0.0
    """how long saves have held up the loop since the step before was recorded"""
    position: Mapping[str, Any] = field(default_factory=dict)
    """``DataPosition.to_dict()`` after this step"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """further keys of the metrics line"""

    def line(self) -> dict[str, Any]:
        """Its part of the metrics line, without ``extra``."""
        return {
            "step": self.step,
            "loss": self.loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "tokens_processed": self.tokens_processed,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens / self.step_seconds if self.step_seconds > 0 else 0.0,
            "data_wait_seconds": self.data_wait_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "checkpoint_seconds": self.checkpoint_seconds,
        }


class RunReport:
    """Console, metrics files, statistics and trackers of one run.

    Lines and warnings are printed from the start; ``begin`` opens the files, the trackers and the bar.

    Args:
        output_dir: folder of ``stats/``.
        rank: only 0 prints and writes.
        log_interval: optimizer steps between printed lines.
    """

    def __init__(self, output_dir: Path, *, rank: int, log_interval: int = 50) -> None:
        self.active = rank == 0
        self._console = Console(active=self.active)
        self.info, self.warn = self._console.info, self._console.warn
        self.output = OutputFolder(output_dir)
        self._log_interval = log_interval
        self.flops_per_token: float | None = None
        self._peak: float | None = None
        self._started = time.monotonic()
        self._first_step = self._step = self._stage_end = 0
        self._stage = ""
        self._pace = Pace()
        self._last: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._source_losses: dict[str, float] = {}
        """The last loss of each source of a mixture."""
        self._metrics: MetricsFile | None = None
        self._samples: LaterFile | None = None
        self._spikes: LaterFile | None = None
        self._trackers: Trackers | None = None
        self.evaluations: LaterFile | None = None
        """on rank 0 after ``begin``"""

    def begin(
        self,
        *,
        first_step: int,
        total_steps: int,
        flops_per_token: float | None = None,
        peak_flops_total: float | None = None,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """The loop is about to start, and ``stats/`` exists.

        Args:
            first_step: optimizer steps completed so far; what the files hold beyond is replaced.
            total_steps: optimizer steps of the whole schedule.
            flops_per_token: training FLOPs (forward and backward) of one token; None: no ``mfu``.
            peak_flops_total: FLOP/s of all devices together; None: no ``mfu``.
            trackers: as ``--tracker`` names them.
            settings: what the trackers keep as the run's configuration.
        """
        self.flops_per_token, self._peak = flops_per_token, peak_flops_total
        self._first_step = self._step = first_step
        self._stage_end = total_steps
        if self.active:
            files = self.output
            self._metrics = MetricsFile(files.metrics, first_step, self.warn)
            self.evaluations, self._samples, self._spikes = (
                LaterFile(path, first_step, self.warn)
                for path in (files.eval_metrics, files.samples, files.spikes)
            )
            self._trackers = Trackers(
                trackers, self.output.root, first_step=first_step, config=settings or {}, warn=self.warn
            )
            self._console.open_bar(first_step, total_steps)

    def begin_stage(self, name: str, last_step: int) -> None:
        """The bar now tells the time to ``last_step``; ``name`` is "" in a run without stages."""
        self._stage, self._stage_end = name, last_step

    def header(self, facts: RunFacts) -> None:
        """Print what this run is."""
        self._facts |= {"model": facts.model, "parameters": facts.parameters}
        self._facts |= {"tp_size": facts.tp_size, "dp_size": facts.dp_size, "precision": facts.precision}
        for line in header_lines(facts):
            self.info(line)

    def note(self, **facts: Any) -> None:
        """Further keys of the statistics files."""
        self._facts |= facts

    def step(self, record: StepRecord) -> None:
        """Record one optimizer step; print its lines where one is due."""
        if not self.active:
            return
        assert self._metrics is not None and self._trackers is not None, "begin comes before the first step"
        line = self._metrics_line(record)
        self._metrics.write(line)
        self._trackers.log(line)
        self._last, self._step = {**line, "data_position": dict(record.position)}, record.step
        self._source_losses |= line.get("loss_by_source", {})
        left = (self._stage_end - record.step) * self._pace.after(record.step_seconds)
        self._console.move_bar(record.step, bar_text(line, stage=self._stage, seconds_left=left))
        if record.step % self._log_interval == 0:
            places = place_lines(record.position, self._source_losses, line.get("samples_by_source", {}))
            self.info(
                f"Step {record.step} | Loss: {record.loss:.4f} | Tokens: {record.tokens_processed:,}\n"
                f"Current LR: {record.lr:.2e}\n" + "\n".join(places)
            )

    def _metrics_line(self, record: StepRecord) -> dict[str, Any]:
        line = record.line()
        if self.flops_per_token and self._peak:
            line["mfu"] = self.flops_per_token * line["tokens_per_second"] / self._peak
        if self._first_step and record.step == self._first_step + 1:
            line["resumed"] = True
        return {**line, **record.extra}

    def validation(self, record: ValidationRecord) -> None:
        """Record and print the loss of one validation set."""
        if self.evaluations is None or self._trackers is None:
            return
        line = record.line()
        self.evaluations.write(line)
        told = {key: line[key] for key in ("loss", "perplexity", "bits_per_byte")}
        self._trackers.log({"step": record.step, "validation": {record.name: told}})
        self.info(record.text())

    def sample(self, step: int, text: str, *, prompt: str, extra: Mapping[str, Any] | None = None) -> None:
        """Record and print a generated text, which begins with its prompt."""
        if self._samples is not None:
            self._samples.write({"step": step, "prompt": prompt, "text": text, **(extra or {})})
        self.info(f"--- Generated text at step {step} ---\n{text}\n{'-' * 40}")

    def spike(self, record: dict[str, Any], text: str) -> None:
        """Record and print a spike that was acted upon."""
        if self._spikes is not None:
            self._spikes.write(record)
        self.info(text)

    def rewind(self, step: int) -> None:
        """The run goes back to ``step``: what was recorded beyond is replaced, the spikes apart."""
        self._step = step
        for file in (self._metrics, self.evaluations, self._samples):
            if file is not None:
                file.rewind(step)

    def facts(self) -> dict[str, Any]:
        """What the statistics files say of the step that was recorded last."""
        return {"step": self._step, "steps_this_run": self._step - self._first_step, **self._last}

    def checkpoint_saved(
        self,
        step: int,
        path: Path,
        *,
        bytes: int,
        seconds: float,
        share: float | None = None,
        facts: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        """Print a save and write ``stats/current_training_stats_tensor_parallel_step_{step}.json``.

        ``share``: of the time since the save before, or since the start, that the loop was held up.
        ``facts``: what `facts` said when the save began.
        """
        if not self.active:
            return
        of_the_time = "" if share is None else f", {share:.1%} of the time"
        where = " in the background" if background else ""
        self.info(f"Saved {path} ({bytes / 1e9:.2f} GB in {seconds:.1f} s{where}{of_the_time})")
        details = {"checkpoint": str(path), "checkpoint_bytes": bytes, "checkpoint_seconds": seconds}
        self._write_stats(self.output.current_stats(step), {**(facts or {}), **details})

    def finish(self, state: str, reason: str | None = None) -> None:
        """Count the warnings; write ``final_training_stats_tensor_parallel_{timestamp}.json``."""
        if not self.active:
            return
        self._console.repeat_warnings()
        timestamp = time.strftime("%Y%m%d_%H%M%S")
        self._write_stats(self.output.final_stats(timestamp), {"state": state, "reason": reason})

    def close(self) -> None:
        """Close bar, files and trackers; calling it again does nothing."""
        self._console.close()
        for file in (self._metrics, self.evaluations, self._samples, self._spikes, self._trackers):
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
            "warnings": dict(self._console.warnings),
        }
        try:
            write_json(path, document)
        except OSError as error:
            self.warn(f"{path} cannot be written ({error.strerror}): training goes on without it")
