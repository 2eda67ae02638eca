"""Validation: the loss of held-out text, measured on the sharded model by all ranks together.

Nothing of the training changes by it: no gradient, no random number, no compiled block.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from argonne.ranks.agree import broadcast_object, only_on_rank_0
from argonne.ranks.recompute import uncompiled
from argonne.ranks.replicas import forward_context, let_go_of_gathered
from argonne.ranks.world import Parallel
from argonne.run.evaluations import ValidationRecord
from argonne.training.build import TrainedModel
from data_stream import HeldOutSet, SourceOptions, read_held_out

IGNORED = -100
"""Target of the sequences that fill up the last micro-batch."""


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """One set as this rank holds it."""

    name: str
    samples: int
    """Of all replicas."""
    block_size: int
    text_bytes: int
    micro_batches: tuple[tuple[Tensor, Tensor], ...]
    """(inputs, targets) of this replica, each (batch_size, block_size) int32 on the CPU.

    As many on every replica; what lies beyond the samples has IGNORED as targets."""


def load_sets(
    eval_data: tuple[tuple[str, str], ...],
    options: SourceOptions,
    tokenizer: Any,
    *,
    samples: int,
    batch_size: int,
    parallel: Parallel,
) -> tuple[ValidationSet, ...]:
    """Read each set on rank 0 and give every replica its share; collective.

    ``options`` are those of the training data. DataError on all ranks where a set cannot be read.
    """
    sets = []
    for name, data_glob in eval_data:
        found = only_on_rank_0(
            lambda name=name, data_glob=data_glob: read_held_out(  # type: ignore[misc]
                name, data_glob, options, tokenizer, samples
            ),
            parallel,
        )
        sets.append(_shared(name, found, (samples, options.block_size + 1), batch_size, parallel))
    return tuple(sets)


def _shared(
    name: str, found: HeldOutSet | None, shape: tuple[int, int], batch_size: int, parallel: Parallel
) -> ValidationSet:
    """The share of this replica of what rank 0 read."""
    tokens = torch.empty(shape, dtype=torch.int32)
    if found is not None:
        tokens.copy_(torch.from_numpy(found.tokens))
    if parallel.control_group is not None:
        dist.broadcast(tokens, src=0, group=parallel.control_group)
    return ValidationSet(
        name=name,
        samples=shape[0],
        block_size=shape[1] - 1,
        text_bytes=broadcast_object(found.text_bytes if found is not None else 0, parallel),
        micro_batches=tuple(_micro_batches(tokens, batch_size, parallel.dp_rank, parallel.dp_size)),
    )


def _micro_batches(
    tokens: Tensor, batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences (m * dp_size + dp_rank) * batch_size and on, for each m; filled up with ignored ones."""
    for first in range(0, len(tokens), batch_size * dp_size):
        start = first + dp_rank * batch_size
        mine = tokens[start : start + batch_size]
        inputs = torch.zeros((batch_size, tokens.shape[1] - 1), dtype=torch.int32)
        targets = torch.full_like(inputs, IGNORED)
        inputs[: len(mine)], targets[: len(mine)] = mine[:, :-1], mine[:, 1:]
        yield inputs, targets


def validate(trained: TrainedModel, validation_set: ValidationSet, step: int) -> ValidationRecord:
    """The mean loss of one set over all replicas; collective, and the same on all ranks."""
    started = time.monotonic()
    parallel = trained.parallel
    context = forward_context(parallel, trained.dtype, sharded=trained.fsdp)
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    with _evaluation(trained.model):
        for inputs, targets in validation_set.micro_batches:
            inputs, targets = (part.to(parallel.device).long() for part in (inputs, targets))
            with context():
                output = trained.model(
                    input_ids=inputs, shift_labels=targets, num_items_in_batch=1, use_cache=False
                )
            total += output.loss.double()
    if parallel.world_group is not None:  # equal on the ranks of a replica
        dist.all_reduce(total, group=parallel.world_group)
        total /= parallel.tp_size
    tokens = validation_set.samples * validation_set.block_size
    return ValidationRecord(
        step=step,
        name=validation_set.name,
        loss=total.item() / tokens,
        samples=validation_set.samples,
        tokens=tokens,
        text_bytes=validation_set.text_bytes,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; the loss is the cross entropy alone.

    Blocks run as they are written.
    """
    config: Any = model.config
    was_training, z_loss_weight = model.training, config.z_loss_weight
    blocks: Any = model.blocks
    model.eval()
    config.z_loss_weight = 0.0
    try:
        with torch.no_grad(), uncompiled(blocks):
            yield
    finally:
        config.z_loss_weight = z_loss_weight
        model.train(was_training)
        let_go_of_gathered(model)
