"""The state of a run between steps: how it advances, and what is recorded and saved of it."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from argonne.config.options import RunConfig
from argonne.errors import NonFiniteError
from argonne.ranks.agree import broadcast_object
from argonne.run.control import RunControl
from argonne.run.report import RunReport, StepRecord
from argonne.training.build import TrainedModel
from argonne.training.changes import (
    SETTINGS_KEY,
    changed_settings,
    rate_jump,
    run_settings,
    saved_settings,
)
from argonne.training.data_places import data_source
from argonne.training.generation import generate_text
from argonne.training.keeper import CheckpointKeeper
from argonne.training.schedule import Schedule
from argonne.training.stages import Stages
from argonne.training.step import StepResult, TrainingStep
from argonne.training.validation import ValidationSet, validate
from argonne.verification.replicas import check_replicas
from checkpointing import CheckpointView
from data_stream import DataProgress, OpenedStream, StepBatch, StepFeed


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(eq=False, kw_only=True)
class Run:
    """Everything the loop works with. ``opened`` and ``tokenizer`` are rank 0's, None elsewhere."""

    stages: Stages
    settings: dict[str, Any]
    """Keyword arguments of ArgonneConfig."""
    trained: TrainedModel
    one_step: TrainingStep
    feed: StepFeed
    opened: OpenedStream | None
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
    progress: DataProgress | None = None
    """Where the data stands after the last batch trained on (rank 0)."""
    data_places: dict[str, Any] = field(default_factory=dict)
    """Where earlier stages left data that this one does not read (rank 0)."""

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
        if self.opened is not None:
            self.progress = self.opened.start
            self.report.note(data_skipped=list(self.progress.skipped))
        if view is None or view.weights_only:
            return
        self.step, self.resumed_from = view.step, view.path
        self.control.record(checkpoint=str(view.path))
        self.tokens_processed = int(view.metadata.get("tokens_processed") or 0)
        self.loss = float(view.metadata.get("loss") or 0.0)
        self.one_step.scaler.load_state_dict(view.metadata.get("loss_scaler") or {})
        if view.metadata.get("stage", "") != self.stages.label().get("stage", ""):
            return  # a stage that begins here has settings of its own
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
        """Count and record a step; NonFiniteError on all ranks where too many in a row were skipped."""
        self.step += 1
        tokens = self.samples_per_step * self.config.training.block_size
        self.tokens_processed += tokens
        self.loss = result.totals.loss
        extra = {
            **self.stages.label(),
            **self._data_progress(batch.progress),
            **self._source_losses(batch, result),
        }
        position = self._position()
        if result.skipped:
            extra["skipped"] = "non-finite loss or gradient"
            self.report.warn(
                "a step was skipped: loss or gradient is not finite", f"(step {self.step}, loss {self.loss})"
            )
        self.report.step(
            StepRecord(
                step=self.step,
                loss=self.loss,
                lr=result.lr,
                grad_norm=result.totals.grad_norm,
                tokens=tokens,
                tokens_processed=self.tokens_processed,
                step_seconds=step_seconds,
                data_wait_seconds=batch.wait_seconds,
                peak_memory_bytes=peak_memory_bytes(self.trained.parallel.device),
                position=position,
                extra=extra,
            )
        )
        self.control.boundary(self.step)
        if result.too_many_skipped:
            raise NonFiniteError(
                f"loss or gradient was not finite in too many steps in a row, up to step {self.step} "
                f"(loss {self.loss}): lower --learning-rate, or check the data with scripts/inspect_data.py"
            )

    def _data_progress(self, progress: DataProgress | None) -> dict[str, Any]:
        """Advance to the place after this step; its keys for the metrics. Reports what was newly skipped."""
        known = len(self.progress.skipped) if self.progress is not None else 0
        self.progress = progress
        if progress is None:
            return {}
        extra = dict(progress.metrics())
        if new := progress.skipped[known:]:
            extra["data_skipped"] = list(new)
            self.report.note(data_skipped=list(progress.skipped))
            for skip in new:
                what = f"{skip['rows']} rows from row {skip['row']} on of {skip['file_name']}"
                self.report.warn("data was skipped (--skip-bad-shards):", f"{what}: {skip['reason']}")
        return extra

    def _source_losses(self, batch: StepBatch, result: StepResult) -> dict[str, Any]:
        """Of a mixture, on rank 0: the mean loss of the step's tokens of each source that has any."""
        if self.opened is None or batch.sources is None:
            return {}
        names, samples = self.opened.source_names, torch.bincount(batch.sources).tolist()
        means = {
            name: loss / (count * self.config.training.block_size)
            for name, loss, count in zip(names, result.totals.source_losses, samples, strict=False)
            if count
        }
        return {"loss_by_source": means}

    def _position(self) -> dict[str, Any]:
        if self.opened is None or self.progress is None:
            return {}
        return self.opened.position_dict(self.progress)

    def _settings(self) -> dict[str, Any]:
        return run_settings(self.config.training, self.trained.dtype, self.samples_per_step)

    def check_replicas_if_due(self) -> None:
        """Compare what several ranks hold alike; PeerError on all ranks where a copy has drifted."""
        interval = self.config.parallel.replica_check_interval
        if interval and self.step % interval == 0:
            check_replicas(self.trained.parameters(), self.trained.slice_map, self.trained.parallel)

    def validate_if_due(self) -> None:
        """Measure the validation sets at their interval and after the last step; collective."""
        interval = self.config.evaluation.eval_interval
        due = self.step == self.stages.last_step or (interval and self.step % interval == 0)
        if not due or not self.validation_sets:
            return
        with self.control.phase("validate"):
            for validation_set in self.validation_sets:
                record = validate(self.trained, validation_set, self.step)
                self.report.validation(dataclasses.replace(record, extra=self.stages.label()))

    def validate_if_missed(self) -> None:
        """A run that was stopped where a validation was due makes it when it is resumed; collective."""
        if self.step and self.validation_sets:
            recorded = self.report.evaluations
            done = recorded is not None and recorded.last_step == self.step
            if not broadcast_object(done, self.trained.parallel):
                self.validate_if_due()

    def save(self) -> Path:
        """Write a checkpoint of the run as it stands; collective."""
        return self.keeper.save(self.step, self.checkpoint_metadata())

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
            **self.data_metadata(),
        }

    def data_metadata(self) -> dict[str, Any]:
        """The keys of a checkpoint about the data; there on rank 0 only."""
        if self.opened is None or self.progress is None:
            return {}
        found: dict[str, Any] = {
            "data_position": self._position(),
            "data_state": self.opened.state_dict(self.progress),
        }
        if self.stages.current.name:
            found |= {"data_source": data_source(self.config), "data_places": self.data_places}
        return found

    def sample(self) -> None:
        """Generate and print a text; collective."""
        with self.control.phase("sample"):
            text = generate_text(self.trained, self.tokenizer, seed=self.config.training.seed + self.step)
        self.report.sample(self.step, text)


def stopwatch() -> float:
    """Seconds on a clock that does not jump."""
    return time.monotonic()
