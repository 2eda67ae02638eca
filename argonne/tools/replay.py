"""A past step of a run, done again: from the nearest kept checkpoint before it, on the processes at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from argonne.config.recipe import Recipe
from argonne.errors import CheckpointError, ConfigError, DataError
from argonne.ranks.agree import broadcast_object, on_rank_0
from argonne.ranks.replicas import forward_context, local_gradients
from argonne.ranks.world import Parallel, World
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from argonne.tools.kept_run import KeptRun
from argonne.tools.replay_past import Past, find_past, replay_recipe
from argonne.tools.replay_result import Figure, MeasuredDocument, Replay
from argonne.tools.step_documents import StepDocument, step_documents
from argonne.training.build import DTYPES, TrainedModel, make_parallel
from argonne.training.optimizer import GradientTotals, reset_adam
from argonne.training.setup import Start, build, choose_start, fill, open_feed, source_options
from argonne.training.spike_guard import SPIKES_KEY, SpikeGuard
from argonne.training.stages import plan_stages, resume_stages
from argonne.training.step import StepResult, TrainingStep, Votes
from data_stream import DataProgress, StepBatch

TOLERANCE = {torch.float32: 1e-3}
"""Relative, of loss and gradient norm at another layout or on another device, where sums run in another
order; the difference grows from step to step."""
LOW_PRECISION_TOLERANCE = 5e-2
IGNORED = -100


class StepReplay:
    """The run, rebuilt at a kept checkpoint, and led to the step; collective in all its parts."""

    def __init__(
        self, recipe: Recipe, past: Past, control: RunControl, report: RunReport, world: World
    ) -> None:
        self.past, self.report = past, report
        start = choose_start(recipe.config, control, report, world)
        if past.first and start.step != past.first:
            raise CheckpointError(f"{past.checkpoint} is of step {start.step}, its name says {past.first}")
        parallel = make_parallel(start.settings, recipe.config.parallel, world)
        stages, _ = resume_stages(plan_stages(recipe, parallel.dp_size), start.metadata, start.step)
        if past.step > stages.last_step:
            raise ConfigError(
                f"--step {past.step} lies in a later stage than the checkpoint of step {past.first}: restore "
                "the checkpoint in which that stage began"
            )
        stage = stages.current
        if past.samples_per_step not in (None, stage.samples_per_step):
            raise ConfigError(
                f"step {past.step} took {past.samples_per_step} samples, and the run's configuration "
                f"{stage.samples_per_step} (--global-batch-size): restore stats/run_config.toml of that time"
            )
        self.config, self.first_step, self.start, self.parallel = (
            stage.config,
            stages.first_step,
            start,
            parallel,
        )
        self._saved_dtype(start)
        self.samples_per_step = stage.samples_per_step
        place = (start.tokenizer, start.metadata, start.step, stage.samples_per_step, report, parallel)
        begins = start.step == stages.first_step
        self.opened, self.feed = open_feed(
            self.config, *place, start.settings["vocab_size"], new_stage=begins
        )
        try:
            self._build(start, stage.accumulation, stage.reset_optimizer and begins)
        except BaseException:
            self.feed.close()
            raise

    def _saved_dtype(self, start: Start) -> None:
        """The run's precision, whatever this device would choose."""
        saved = start.metadata.get("model_dtype")
        names = {str(dtype): name for name, dtype in DTYPES.items()}
        if self.config.training.dtype is None and saved in names:
            training = replace(self.config.training, dtype=names[saved])
            self.config = replace(self.config, training=training)

    def _build(self, start: Start, accumulation: int, reset: bool) -> None:
        config = self.config
        self.trained: TrainedModel = build(config, start.settings, self.parallel)
        fill(config, self.trained, start, self.report)
        if reset:
            reset_adam(self.trained.optimizer)
        guard = SpikeGuard(config.control.spike_action)
        guard.load_state_dict(start.metadata.get(SPIKES_KEY) or {})
        self.one_step = TrainingStep(self.trained, config.training, accumulation, guard.judge_of_steps)
        self.one_step.scaler.load_state_dict(start.metadata.get("loss_scaler") or {})
        self.before: DataProgress | None = self.opened.start if self.opened is not None else None

    def lead(self) -> StepBatch:
        """Do the steps up to the one asked for, and return its batch; the weights are those before it.

        Raises DataError where the data gives other tokens than the run trained on.
        """
        for number in range(self.past.first + 1, self.past.step + 1):
            record = self.past.records[number]
            for _ in range(_passed_over(record)):
                self.before = self.feed.next().progress
            batch = self.feed.next()
            recorded = record.get("stream_hash")
            if recorded is not None and batch.stream_hash != recorded:
                raise DataError(
                    f"step {number} had the stream hash {recorded}, and the data now gives "
                    f"{batch.stream_hash}: the data or its flags changed since; restore them"
                )
            if number == self.past.step:
                return batch
            self.one_step.run(batch, number - 1 - self.first_step, votes=Votes())
            self.before = batch.progress
        raise AssertionError("a step lies after its checkpoint")

    def finish(self, batch: StepBatch) -> StepResult:
        """The step itself."""
        return self.one_step.run(batch, self.past.step - 1 - self.first_step, votes=Votes())

    def figures(self, batch: StepBatch, result: StepResult) -> tuple[Figure, ...]:
        """The step's figures beside the recorded ones."""
        record = self.past.records[self.past.step]
        tolerance = TOLERANCE.get(self.trained.dtype, LOW_PRECISION_TOLERANCE)
        totals = result.totals
        return (
            Figure(name="stream_hash", recorded=record.get("stream_hash"), replayed=batch.stream_hash),
            Figure(name="lr", recorded=record.get("lr"), replayed=result.lr),
            Figure(
                name="loss", recorded=record.get("loss"), replayed=_finite(totals.loss), tolerance=tolerance
            ),
            Figure(
                name="grad_norm",
                recorded=record.get("grad_norm"),
                replayed=_finite(totals.grad_norm),
                tolerance=tolerance,
            ),
        )

    def documents(self, batch: StepBatch) -> tuple[StepDocument, ...]:
        """The step's documents, the same on all ranks."""

        def find() -> tuple[StepDocument, ...]:
            assert self.before is not None
            options = source_options(self.config, self.samples_per_step, self.start.settings["vocab_size"])
            sources = None if batch.sources is None else batch.sources.tolist()
            return tuple(
                step_documents(options, self.start.tokenizer, self.before, batch.tokens.numpy(), sources)
            )

        return tuple(broadcast_object(on_rank_0(find, self.parallel), self.parallel))

    def measure(self, batch: StepBatch, document: StepDocument) -> MeasuredDocument:
        """Loss and gradient norm of one document under the weights before the step."""
        trained, parallel = self.trained, self.parallel
        trained.optimizer.zero_grad(set_to_none=True)
        context = forward_context(parallel, trained.dtype, sharded=trained.fsdp)
        scale, total = self.one_step.scaler.scale, torch.zeros((), dtype=torch.float64)
        every = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
        for sample in dict.fromkeys(piece.sample for piece in document.pieces):
            tokens = batch.tokens[sample : sample + 1].to(parallel.device).long()
            targets = torch.full_like(tokens[:, 1:], IGNORED)
            for _, begin, end in (piece for piece in document.pieces if piece.sample == sample):
                targets[:, begin:end] = tokens[:, begin + 1 : end + 1]
            inputs, within = tokens[:, :-1].contiguous(), {}
            if batch.document_ids is not None:
                within["document_ids"] = batch.document_ids[sample : sample + 1].to(parallel.device)
            with context():
                mean = trained.wrapped(input_ids=inputs, shift_labels=targets, **within).loss
            count = int((targets != IGNORED).sum())
            (mean * (count / every) * scale).backward()
            total += mean.detach().double().cpu() * count
        gradients = local_gradients(trained.model)
        trained.tensor_parallel.sum_partial_gradients(gradients)
        sums = GradientTotals(trained.slice_map, parallel.rank, parallel.world_group)
        norm = sums.reduce(gradients, loss_share=torch.zeros((), device=parallel.device), scale=scale).read()
        trained.optimizer.zero_grad(set_to_none=True)
        return MeasuredDocument(
            document=document,
            loss=float(total) / document.tokens,
            grad_norm=norm.grad_norm,
            text=self._text(batch, document),
        )

    def _text(self, batch: StepBatch, document: StepDocument) -> str:
        if self.start.tokenizer is None:
            return ""
        ids = [
            token
            for sample, begin, end in document.pieces
            for token in batch.tokens[sample, begin:end].tolist()
        ]
        return str(self.start.tokenizer.decode(ids))


def replay(run: KeptRun, recipe: Recipe, step: int, folder: Path, parts: Any, *, from_start: bool) -> Replay:
    """All of it; ``parts`` is (control, report, world). Collective."""
    control, report, world = parts
    past = on_rank_0(
        lambda: find_past(run, step, recipe.config.training.block_size, from_start=from_start), world
    )
    own = replay_recipe(recipe, past, run, folder, world)
    replayed = StepReplay(own, past, control, report, world)
    parallel: Parallel = replayed.parallel
    try:
        batch = replayed.lead()
        measured: tuple[MeasuredDocument, ...] = ()
        notes = list(getattr(report, "said", ()))
        if parallel.dp_size == 1:
            measured = tuple(replayed.measure(batch, document) for document in replayed.documents(batch))
        else:
            notes.append("documents are measured on one replica only: give as many processes as one has")
        result = replayed.finish(batch)
    finally:
        replayed.feed.close()
    layout = f"tensor parallel {parallel.tp_size} x data parallel {parallel.dp_size}"
    return Replay(
        step=step,
        checkpoint=past.checkpoint,
        layout=f"{layout} on {parallel.device.type}, {str(replayed.trained.dtype).removeprefix('torch.')}",
        figures=replayed.figures(batch, result),
        same_layout=(parallel.tp_size, parallel.dp_size) == (past.tp_size, past.dp_size),
        documents=measured,
        notes=tuple(dict.fromkeys(notes)),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _passed_over(record: Mapping[str, Any]) -> int:
    """Batches that the run passed over before a step because it had gone back from a spike."""
    spike = record.get("spike") or {}
    if "back_to_step" not in spike:
        return 0
    return int(spike["step"]) - int(spike["back_to_step"])
