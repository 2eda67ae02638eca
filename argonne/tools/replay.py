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
from argonne.ranks.agree import barrier, broadcast_object, on_rank_0
from argonne.ranks.world import Parallel, World
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from argonne.tools.kept_run import KeptRun
from argonne.tools.replay_measure import measure
from argonne.tools.replay_past import Past, find_past, replay_recipe
from argonne.tools.replay_result import Figure, Replay
from argonne.tools.step_documents import StepDocument, step_documents
from argonne.training.auto_layout import resolve_layout
from argonne.training.build import DTYPES, TrainedModel, make_parallel
from argonne.training.optimizer import StepTotals, reset_adam
from argonne.training.setup import Start, build, choose_start, fill, open_feed, source_options
from argonne.training.spikes import Spike
from argonne.training.stages import plan_stages, resume_stages
from argonne.training.step import StepResult, TrainingStep, Votes
from data_stream import DataProgress, Exclusion, StepBatch

TOLERANCE = {torch.float32: 1e-3}
"""Relative, of loss and gradient norm at another layout or on another device, where sums run in another
order; the difference grows from step to step."""
LOW_PRECISION_TOLERANCE = 5e-2


class StepReplay:
    """The run, rebuilt at a kept checkpoint, and led to the step; collective in all its parts."""

    def __init__(
        self, recipe: Recipe, past: Past, control: RunControl, report: RunReport, world: World
    ) -> None:
        self.past, self.report = past, report
        start = choose_start(recipe.config, control, report, world)
        if past.first and start.step != past.first:
            raise CheckpointError(f"{past.checkpoint} is of step {start.step}, its name says {past.first}")
        recipe = resolve_layout(recipe, start.settings, world).recipe
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
        self._recorded: Mapping[str, Any] = {}
        begins = start.step == stages.first_step
        self._open(start.metadata, start.step, past.first + 1, new_stage=begins)
        try:
            self._build(start, stage.accumulation, stage.reset_optimizer and begins)
        except BaseException:
            self.feed.close()
            raise

    def _open(self, metadata: Mapping[str, Any], step: int, number: int, *, new_stage: bool) -> None:
        """Open the data at the place in ``metadata``, under the list of excluded documents of a step."""
        self._digest = str(self.past.records[number].get("excluded_list") or "")
        path = self.past.lists.get(self._digest)
        data = replace(self.config.data, exclude_documents=None if path is None else str(path))
        self.config = replace(self.config, data=data)
        state = metadata.get("data_state")
        if (
            isinstance(state, dict) and self.parallel.rank == 0
        ):  # the run has taken the list up already: nothing is new in it
            rows = Exclusion() if path is None else Exclusion.read(path)
            metadata = {**metadata, "data_state": {**state, "excluded": rows.rows}}
        place = (self.start.tokenizer, metadata, step, self.samples_per_step, self.report, self.parallel)
        vocab_size = self.start.settings["vocab_size"]
        self.opened, self.feed = open_feed(self.config, *place, vocab_size, new_stage=new_stage)

    def _take_up_list(self, number: int) -> None:
        """Open the data again where the run took up another list before step ``number``."""
        if str(self.past.records[number].get("excluded_list") or "") == self._digest:
            return
        self.feed.close()
        barrier(self.parallel)  # no feed of this group is left on any rank
        self.feed.close()
        place: dict[str, Any] = {}
        if self.opened is not None and self.before is not None:
            place = {
                "data_position": self.opened.position_dict(self.before),
                "data_state": self.opened.state_dict(self.before),
            }
        self._open(place, number - 1, number, new_stage=False)

    def _recorded_spike(self, totals: StepTotals) -> Spike | None:
        """What leaves a step out that the run left out: its value beside the threshold of that time."""
        if not self._recorded.get("skipped"):
            return None
        told = self._recorded.get("spike") or {}
        quantity, threshold = str(told.get("quantity", "loss")), float(told.get("threshold", math.inf))
        return Spike(quantity=quantity, value=float(getattr(totals, quantity)), threshold=threshold)

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
        # Not by the rule: it remembers steps that the run went back from, and that are not done again.
        self.one_step = TrainingStep(self.trained, config.training, accumulation, self._recorded_spike)
        self.one_step.scaler.load_state_dict(start.metadata.get("loss_scaler") or {})
        self.before: DataProgress | None = self.opened.start if self.opened is not None else None

    def lead(self) -> StepBatch:
        """Do the steps up to the one asked for, and return its batch; the weights are those before it.

        Raises DataError where the data gives other tokens than the run trained on.
        """
        for number in range(self.past.first + 1, self.past.step + 1):
            record = self._recorded = self.past.records[number]
            self._take_up_list(number)
            for _ in range(self.past.passed_over.get(number, 0)):
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
        left_out = (record.get("skipped"), _skipped(result))
        skipped = (Figure(name="skipped", recorded=left_out[0], replayed=left_out[1]),)
        return (
            *(skipped if any(left_out) else ()),
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
            assert self.opened is not None
            options = source_options(self.config, self.samples_per_step, self.start.settings["vocab_size"])
            sources = None if batch.sources is None else batch.sources.tolist()
            return tuple(
                step_documents(
                    options,
                    self.start.tokenizer,
                    self.before,
                    batch.tokens.numpy(),
                    sources,
                    self.opened.identity.get("cached_without"),
                )
            )

        return tuple(broadcast_object(on_rank_0(find, self.parallel), self.parallel))


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
        how = {"scale": replayed.one_step.scaler.scale, "tokenizer": replayed.start.tokenizer}
        measured = tuple(
            measure(replayed.trained, batch, document, **how) for document in replayed.documents(batch)
        )
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
        notes=tuple(dict.fromkeys(getattr(report, "said", ()))),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _skipped(result: StepResult) -> str | None:
    """As the metrics say it."""
    if result.skipped:
        return "non-finite loss or gradient"
    return "spike" if result.spike is not None and result.spike.value > result.spike.threshold else None
