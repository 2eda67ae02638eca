"""The state of a run between steps: how it advances, and what is recorded and saved of it."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from argonne.config.options import RunConfig
from argonne.errors import NonFiniteError
from argonne.run.control import RunControl
from argonne.run.report import RunReport, StepRecord
from argonne.training.audit import SelfAudit
from argonne.training.build import TrainedModel
from argonne.training.changes import (
    SETTINGS_KEY,
    changed_settings,
    rate_jump,
    run_settings,
    saved_settings,
)
from argonne.training.keeper import CheckpointKeeper
from argonne.training.profiling import GarbageControl, StepProfiler
from argonne.training.run_data import RunData
from argonne.training.schedule import Schedule
from argonne.training.spike_guard import SPIKES_KEY, SpikeGuard
from argonne.training.stages import Stages
from argonne.training.step import StepResult, TrainingStep
from argonne.training.validation import ValidationSet
from checkpointing import CheckpointView
from data_stream import StepBatch, StepFeed


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reserved_memory(device: torch.device) -> dict[str, int]:
    """Key of the metrics for what torch's allocator has held of a GPU at most, unused pieces included."""
    return {"peak_reserved_bytes": torch.cuda.max_memory_reserved(device)} if device.type == "cuda" else {}


@dataclass(frozen=True, kw_only=True)
class Advance:
    """Where a step brings the run, known when it is started."""

    step: int
    """Its number, from 1."""
    tokens: int
    """Trained on in it."""
    tokens_processed: int
    """Up to its end."""
    before: dict[str, Any]
    """Data position that it started from."""
    position: dict[str, Any]
    """Data position that it ends at."""
    samples_of_sources: tuple[int, ...] | None
    """Of a mixture: its samples of each source."""
    wait_seconds: float
    """For its batch."""
    extra: dict[str, Any]
    """Further keys of its metrics line."""


@dataclass(eq=False, kw_only=True)
class Run:
    """Everything the loop works with. ``tokenizer`` is rank 0's, None elsewhere."""

    stages: Stages
    settings: dict[str, Any]
    """Keyword arguments of ArgonneConfig."""
    trained: TrainedModel
    one_step: TrainingStep
    feed: StepFeed
    data: RunData
    tokenizer: Any
    keeper: CheckpointKeeper
    control: RunControl
    report: RunReport
    validation_sets: tuple[ValidationSet, ...] = ()
    step: int = 0
    """Optimizer steps completed since training began."""
    tokens_processed: int = 0
    loss: float = 0.0
    """Of the last step."""
    resumed_from: Path | None = None
    """The checkpoint that this run began with; None: from scratch."""
    spikes: SpikeGuard = field(default_factory=lambda: SpikeGuard("none"))
    profiler: StepProfiler = field(default_factory=StepProfiler)
    garbage: GarbageControl = field(default_factory=GarbageControl)
    audit: SelfAudit = field(default_factory=SelfAudit)

    @property
    def config(self) -> RunConfig:
        """The current stage's."""
        return self.stages.current.config

    @property
    def samples_per_step(self) -> int:
        return self.stages.current.samples_per_step

    @property
    def stage_step(self) -> int:
        """Optimizer steps completed in the current stage: where its schedule stands."""
        return self.step - self.stages.first_step

    def restore(self, view: CheckpointView | None) -> None:
        """Counters from the checkpoint, and what this run changes; where the data begins, from the source."""
        self.data.begin()
        if view is None or view.weights_only:
            return
        self.step, self.resumed_from = view.step, view.path
        self.control.record(checkpoint=str(view.path))
        self.tokens_processed = int(view.metadata.get("tokens_processed") or 0)
        self.loss = float(view.metadata.get("loss") or 0.0)
        self.one_step.scaler.load_state_dict(view.metadata.get("loss_scaler") or {})
        if view.metadata.get("stage", "") != self.stages.label().get("stage", ""):
            return  # a stage that begins here has settings of its own
        self.spikes.load_state_dict(view.metadata.get(SPIKES_KEY) or {})
        for line in changed_settings(saved_settings(view), self._settings()):
            self.report.info(line)
        jump = rate_jump(view, Schedule.of(self.config.training), self.stages.first_step)
        if jump is not None:
            self.report.warn(jump)

    @property
    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint written, or else the one resumed from."""
        return self.keeper.newest or self.resumed_from

    def finished_before(self) -> str:
        """What to print where no step is left to train."""
        training, stage = self.config.training, self.stages.current.name
        if stage:
            return (
                f"This recipe has already finished: {self.resumed_from} is at step {self.step}, the end of "
                f"its last stage {stage}; add a stage, or give that one more steps, to train on"
            )
        flag, asked = "--total-steps", f"--total-steps {training.total_steps}"
        if training.total_tokens is not None:
            flag = "--total-tokens"
            asked = f"the {training.total_steps} steps of --total-tokens {training.total_tokens}"
        return (
            f"This run has already finished: {self.resumed_from} is at step {self.step} of {asked}; "
            f"give a larger {flag} to train on"
        )

    def complete(self, batch: StepBatch, result: StepResult, step_seconds: float) -> None:
        """`advance` and `record` in one."""
        self.record(self.advance(batch), result, step_seconds)

    def advance(self, batch: StepBatch) -> Advance:
        """Count a step that has been started, whatever it comes to."""
        self.step += 1
        tokens = self.samples_per_step * self.config.training.block_size
        self.tokens_processed += tokens
        before = self.data.position()
        extra = {**self.stages.label(), **self.data.advance(batch.progress)}
        sources = None if batch.sources is None else tuple(torch.bincount(batch.sources).tolist())
        return Advance(
            step=self.step,
            tokens=tokens,
            tokens_processed=self.tokens_processed,
            before=before,
            position=self.data.position(),
            samples_of_sources=sources,
            wait_seconds=batch.wait_seconds,
            extra={**extra, **self.spikes.take_note()},
        )

    def record(self, step: Advance, result: StepResult, step_seconds: float) -> None:
        """Record what a step came to; NonFiniteError on all ranks where too many in a row were skipped."""
        self.loss = result.totals.loss
        extra = {**step.extra, **self._source_losses(step, result)}
        extra |= dict(zip(("ce_loss", "kd_loss"), result.totals.loss_parts, strict=False))
        extra |= reserved_memory(self.trained.parallel.device)
        if result.spike is not None:
            extra |= self.spikes.skipped(result.spike, step.step, step.before, step.position, self.report)
        if result.skipped:
            extra["skipped"] = "non-finite loss or gradient"
            self.report.warn(
                "a step was skipped: loss or gradient is not finite", f"(step {step.step}, loss {self.loss})"
            )
        self.report.step(
            StepRecord(
                step=step.step,
                loss=self.loss,
                lr=result.lr,
                grad_norm=result.totals.grad_norm,
                tokens=step.tokens,
                tokens_processed=step.tokens_processed,
                step_seconds=step_seconds,
                data_wait_seconds=step.wait_seconds,
                peak_memory_bytes=peak_memory_bytes(self.trained.parallel.device),
                checkpoint_seconds=self.keeper.take_held_seconds(),
                position=step.position,
                extra=extra,
            )
        )
        self.control.boundary(step.step)
        if result.too_many_skipped:
            self.keeper.wait()
            raise NonFiniteError(
                f"loss or gradient was not finite in too many steps in a row, up to step {step.step} "
                f"(loss {self.loss}): lower --learning-rate, or check the data with scripts/inspect_data.py"
            )

    def _source_losses(self, step: Advance, result: StepResult) -> dict[str, Any]:
        samples = step.samples_of_sources
        if samples is None:
            return {}
        block_size = self.config.training.block_size
        return self.data.source_losses(samples, result.totals.source_losses, block_size)

    def _settings(self) -> dict[str, Any]:
        config, teacher = self.config, self.trained.teacher
        stored = None if teacher is None else teacher.stored
        several = self.trained.parallel.dp_size > 1
        return run_settings(
            config.training, config.distillation, self.trained.dtype, self.samples_per_step, stored,
            config.parallel.data_parallel if several else None,
        )  # fmt: skip

    def save(self, *, whole: bool = True) -> Path:
        """Write a checkpoint of the run as it stands; collective. ``whole``: as `CheckpointKeeper.save`."""
        return self.keeper.save(self.step, self.checkpoint_metadata(), whole=whole)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """The keys of a checkpoint beside weights and optimizer; the data's are there on rank 0 only."""
        return {
            "global_step": self.step,
            "tokens_processed": self.tokens_processed,
            "scheduler_state_dict": {"step": self.step - 1},
            "loss": self.loss if math.isfinite(self.loss) else None,
            "model_dtype": str(self.trained.dtype),
            "model_config": {"model_type": "argonne2", **self.settings},
            "loss_scaler": dict(self.one_step.scaler.state_dict()),
            "global_batch_size": self.samples_per_step,
            "seed": self.config.training.seed,
            SETTINGS_KEY: self._settings(),
            "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **self.stages.metadata(self.step),
            **self.spikes.metadata(),
            **self.data.metadata(self.config, staged=bool(self.stages.current.name)),
        }


def stopwatch() -> float:
    """Seconds on a clock that does not jump."""
    return time.monotonic()
