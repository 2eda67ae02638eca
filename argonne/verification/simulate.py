"""Tensor parallelism simulated in one process, measured and compared with the unsharded model.

The ranks are threads, their collectives explicit sums; slices, layers and the collectives' gradients are
the very ones that training uses. Used by the verification script and the tests. Nothing here prints.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argonne.tp.costs import SHARED
from argonne.tp.group import CollectiveCounters, SimulatedTPGroup, TPGroup
from argonne.tp.slices import SliceMap
from argonne.verification.compare import Difference, difference
from tp_shard import TensorParallelState, shard_tensor_parallel

T = TypeVar("T")
Traffic = dict[str, tuple[int, int]]


def simulate(groups: Sequence[SimulatedTPGroup], work: Callable[[SimulatedTPGroup], T]) -> list[T]:
    """Run ``work`` on a thread for each member of one simulated group; return the results by rank.

    Raises what the first failing rank raised; the others are woken from the collective they are waiting in.
    """

    def run(group: SimulatedTPGroup) -> T:
        finished = False
        try:
            result = work(group)
            finished = True
        finally:
            if not finished:
                group.abort()
        return result

    with ThreadPoolExecutor(max_workers=len(groups)) as pool:
        futures = [pool.submit(run, group) for group in groups]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank, or the unsharded model, computed from one batch."""

    logits: Tensor
    """(batch, seq_len, vocab_size), gathered, from a forward pass without loss."""
    loss: float
    gradients: dict[str, Tensor]
    """Local gradients by parameter name."""
    forward: Traffic
    """Collectives of the forward pass with loss: kind -> (calls, payload bytes)."""
    step: Traffic
    """Collectives of forward and backward pass and of completing replicated gradients."""


def measure(model: nn.Module, ids: Tensor) -> Measured:
    """Logits, loss (next token of ``ids`` (batch, seq_len)), gradients and collectives of a model.

    Works on unsharded and sharded models alike; the loss of an unsharded one is torch's own cross entropy.
    """
    state: TensorParallelState | None = getattr(model, "tensor_parallel", None)
    sharers = None if state is None else state.sharers
    counters = CollectiveCounters() if state is None else state.group.counters
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    counters.reset()
    if sharers is not None:
        sharers.counters.reset()
    if state is None:
        scores = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
        if weight := getattr(model.config, "z_loss_weight", 0.0):
            loss = loss + weight * scores.logsumexp(-1).square().mean()
    else:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    forward = counters.totals()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if state is not None:
        state.sum_partial_gradients(gradients)
    return Measured(
        logits=logits,
        loss=loss.item(),
        gradients=gradients,
        forward=forward,
        step=counters.totals() | _of_copies(sharers),
    )


def _of_copies(sharers: TPGroup | None) -> Traffic:
    """What completing the gradients of copied key/value heads took."""
    if sharers is None or not sharers.counters.total_calls:
        return {}
    return {SHARED: (sharers.counters.total_calls, sharers.counters.total_bytes)}


def measure_simulated(
    model: nn.Module, ids: Tensor, size: int, *, sequence_parallel: bool, pad_to: int = 1
) -> tuple[list[Measured], SliceMap]:
    """Split copies of ``model`` over ``size`` simulated ranks and measure each; also their slice map.

    One whole copy exists at a time while the slices are cut.
    """
    groups = SimulatedTPGroup.create(size)
    sharded = [
        shard_tensor_parallel(copy.deepcopy(model), group, sequence_parallel=sequence_parallel, pad_to=pad_to)
        for group in groups
    ]
    state: TensorParallelState = sharded[0].tensor_parallel  # type: ignore[assignment]
    return simulate(groups, lambda group: measure(sharded[group.rank], ids)), state.slice_map


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The ranks of a split model against the unsharded model, on one batch."""

    logits: Difference
    loss: Difference
    gradients: tuple[Difference, ...]
    """In parameter order; each assembled from the slices that own its elements."""
    unequal_copies: tuple[str, ...]
    """Parameters whose copies on several ranks have gradients that differ in some bit."""

    @property
    def worst(self) -> Difference:
        """The gradient that is furthest off, relatively."""
        return max(self.gradients, key=lambda gradient: gradient.relative)

    def agrees(self, tolerance: float) -> bool:
        """All relative differences within ``tolerance`` and all copies equal."""
        compared = (self.logits, self.loss, *self.gradients)
        return not self.unequal_copies and all(one.relative <= tolerance for one in compared)


def compare_ranks(reference: Measured, ranks: Sequence[Measured], slice_map: SliceMap) -> Comparison:
    """Compare what the ranks measured with the unsharded model, every gradient element once."""
    logits = [difference("logits", rank.logits, reference.logits) for rank in ranks]
    expected_loss = torch.tensor(reference.loss, dtype=torch.float64)
    losses = [
        difference("loss", torch.tensor(rank.loss, dtype=torch.float64), expected_loss) for rank in ranks
    ]
    total = math.sqrt(sum(g.double().square().sum().item() for g in reference.gradients.values()))
    gradients, unequal = [], []
    for name in slice_map.names:
        expected = reference.gradients[name]
        whole = torch.full_like(expected, math.nan)
        for rank, measured in enumerate(ranks):
            for box in slice_map.owned(name, rank):
                whole[box.unsharded_index] = measured.gradients[name][box.local_index]
        gradients.append(difference(name, whole, expected, total))
        copies = (
            torch.equal(whole[box.unsharded_index], measured.gradients[name][box.local_index])
            for rank, measured in enumerate(ranks)
            for box in slice_map.rectangles(name, rank)
        )
        if not all(copies):
            unequal.append(name)
    return Comparison(
        logits=max(logits, key=lambda one: one.relative),
        loss=max(losses, key=lambda one: one.relative),
        gradients=tuple(gradients),
        unequal_copies=tuple(unequal),
    )
