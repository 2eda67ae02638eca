"""One optimizer step: micro-batches, gradients over the slice map, clipping, the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from argonne.config.options import TrainingOptions
from argonne.ranks.replicas import forward_context, gradient_sync, local_gradients
from argonne.training.build import TrainedModel
from argonne.training.optimizer import (
    DeviceTotals,
    GradientTotals,
    LossScaler,
    NonFiniteRule,
    StepTotals,
    apply_update,
    set_learning_rate,
)
from argonne.training.schedule import Schedule
from argonne.training.spikes import Spike
from data_stream import StepBatch


@dataclass(frozen=True, kw_only=True)
class Votes:
    """What one rank has to say at a step's boundary; or, after the step, whether any rank said so."""

    stop: bool = False
    """The rank was asked to stop."""
    busy: bool = False
    """It is still verifying the last checkpoint."""
    spoiled: bool = False
    """It found the last checkpoint spoiled, which is to be saved again."""
    failed: bool = False
    """Its part of the save in the background ended with an error."""

    def numbers(self) -> list[float]:
        """1 for yes and 0 for no, to be summed over the ranks."""
        return [float(vote) for vote in astuple(self)]

    def and_of(self, other: Votes) -> Votes:
        """What was said in either."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Votes(**dict(zip(self.__dataclass_fields__, map(any, pairs), strict=True)))

    @classmethod
    def of_any(cls, sums: Sequence[float]) -> Votes:
        """From the sums of all ranks' ``numbers``."""
        stop, busy, spoiled, failed = (count > 0 for count in sums)
        return cls(stop=stop, busy=busy, spoiled=spoiled, failed=failed)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did; the same on all ranks."""

    totals: StepTotals
    votes: Votes
    """What any rank voted."""
    lr: float
    """Rate of the update."""
    skipped: bool
    """Loss or gradient was not finite, and the weights were left alone."""
    too_many_skipped: bool
    spike: Spike | None = None
    """A loss or norm beyond the threshold, for which the weights were left alone."""


@dataclass(frozen=True, kw_only=True)
class StartedStep:
    """A step that the device was given whole; its totals may still be on their way."""

    totals: DeviceTotals
    lr: float
    read: StepTotals | None = None
    """The totals where the host had to see them before the update."""
    spike: Spike | None = None


class TrainingStep:
    """Takes the batch of one step through the model.

    Micro-batch m of data-parallel rank d is the batch_size samples from (m * dp_size + d) * batch_size on.
    Whether a step that is not finite is left out, and how much it is clipped, is decided on the device, so
    that `start` waits for nothing; `finish` reads the totals, and may do so when the next step is under way.
    The host sees them before the update where it must: ``judge`` finds spikes in totals that are finite
    (None: no judge), and the loss scale of float16 follows each step.
    """

    def __init__(
        self,
        trained: TrainedModel,
        options: TrainingOptions,
        accumulation: int,
        judge: Callable[[StepTotals], Spike | None] | None = None,
    ) -> None:
        self._judge = judge
        self._trained = trained
        self._options = options
        self._accumulation = accumulation
        self._schedule = Schedule.of(options)
        parallel = trained.parallel
        self._context = forward_context(parallel, trained.dtype, sharded=trained.fsdp)
        self._totals = GradientTotals(trained.slice_map, parallel.rank, parallel.world_group)
        self.scaler = LossScaler(enabled=trained.dtype is torch.float16)
        self._rule = NonFiniteRule()
        self._loss_parts: torch.Tensor | None = None

    @property
    def reads_late(self) -> bool:
        """Whether a step may be finished after the start of the next; a CPU would gain nothing."""
        return self._trained.parallel.device.type == "cuda" and not self.decides_on_host

    @property
    def decides_on_host(self) -> bool:
        """Whether each step's totals are read before its update or the next step."""
        return self._judge is not None or self.scaler.enabled

    def run(self, batch: StepBatch, step: int, *, votes: Votes) -> StepResult:
        """Optimizer step ``step`` (0-based); ``votes`` are this rank's, summed in the step's all-reduce."""
        return self.finish(self.start(batch, step, votes=votes))

    def start(self, batch: StepBatch, step: int, *, votes: Votes) -> StartedStep:
        """Give the device all of the step, the update included."""
        self._trained.optimizer.zero_grad(set_to_none=True)
        loss, source_losses = self.accumulate(batch)
        return self.update(loss, source_losses, step, votes=votes)

    def update(
        self, loss: torch.Tensor, source_losses: torch.Tensor | None, step: int, *, votes: Votes
    ) -> StartedStep:
        """The second half of `start`: totals, clipping and AdamW, from what `accumulate` returned."""
        options, trained = self._options, self._trained
        gradients = local_gradients(trained.model)
        trained.tensor_parallel.sum_partial_gradients(gradients)
        # Equal on the ranks of a replica, different between replicas: this rank's share of the mean.
        share = loss / trained.parallel.world_size
        totals = self._totals.reduce(
            gradients,
            loss_share=share,
            votes=votes.numbers(),
            scale=self.scaler.scale,
            # Each sample's loss is equal on the ranks of its replica.
            source_losses=None if source_losses is None else source_losses / trained.parallel.tp_size,
            loss_parts=None if self._loss_parts is None else self._loss_parts / trained.parallel.world_size,
        )
        lr = self._schedule.rate(step)
        set_learning_rate(trained.optimizer, lr)
        read = totals.read() if self.decides_on_host else None
        spike = self._judge(read) if self._judge is not None and read is not None and read.finite else None
        if spike is None:
            apply_update(trained.optimizer, gradients, totals, max_norm=options.grad_clip)
        return StartedStep(totals=totals, lr=lr, read=read, spike=spike)

    def finish(self, started: StartedStep) -> StepResult:
        """Read what the step came to. Steps are finished in the order in which they were started."""
        totals = started.totals.read() if started.read is None else started.read
        searching = self.scaler.enabled and self.scaler.scale > 1.0
        too_many = self._rule.record(skipped=not totals.finite and not searching)
        self.scaler.update(totals.finite)
        return StepResult(
            totals=totals,
            votes=Votes.of_any(totals.votes),
            lr=started.lr,
            skipped=not totals.finite,
            too_many_skipped=too_many,
            spike=started.spike,
        )

    def accumulate(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward and backward of all micro-batches.

        Returns this replica's mean loss, 0-d on the device, and of a mixture the sum of the losses of its
        tokens of each source, (sources,).
        """
        trained, parallel = self._trained, self._trained.parallel
        total = torch.zeros((), device=parallel.device)
        model: Any = trained.model
        self._loss_parts = None if trained.teacher is None else torch.zeros(2, device=parallel.device)
        by_source = None
        if batch.sources is not None:  # numbered alike on all ranks, which hold the whole step
            by_source = torch.zeros(int(batch.sources.max()) + 1, device=parallel.device)
        for micro_step in range(self._accumulation):
            place: dict[str, Any] = {
                "batch_size": self._options.batch_size,
                "dp_rank": parallel.dp_rank,
                "dp_size": parallel.dp_size,
                "device": parallel.device,
            }
            inputs, targets = batch.micro_batch(micro_step, **place)
            sources = batch.micro_sources(micro_step, **place)
            documents = batch.micro_documents(micro_step, **place)
            within = {} if documents is None else {"document_ids": documents}
            if trained.teacher is not None:
                model.soft_targets = trained.teacher.targets(batch, micro_step, place)
            last = micro_step == self._accumulation - 1
            with gradient_sync(trained.model, trained.wrapped, last=last):
                with self._context():
                    # The logits that are returned beside it would stay through the backward pass.
                    loss = trained.wrapped(input_ids=inputs, shift_labels=targets, **within).loss
                    loss = loss / self._accumulation
                (loss * self.scaler.scale).backward()
            if self._loss_parts is not None:
                model.soft_targets = None  # a validation has no teacher
                self._loss_parts += model.loss_parts / self._accumulation
            total += loss.detach()
            if by_source is not None and sources is not None:
                by_source.index_add_(0, sources, model.sample_losses.to(by_source.dtype))
        return total, by_source
