"""Head and loss in chunks of tokens: no step holds the logits of all its tokens.

The forward pass makes a chunk's logits, its losses and, since the loss is at the end, their gradient at once,
turns that into gradients of the hidden states and of the head's weight, and lets the logits go. On several
ranks a token's normaliser needs all slices of the vocabulary: a first pass over the chunks finds the largest
logit and the sum in each slice, one max and one stacked sum are exchanged for all tokens, as in
``argonne.tp.loss``, and a second pass makes the logits again. So chunks add no collective, and cost one more
product where there are several of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from argonne.tp.cpu_products import add_matrix_product, matrix_product, times_transposed
from argonne.tp.group import TPGroup
from argonne.tp.loss import (
    IGNORE_INDEX,
    LossRule,
    Places,
    check_targets,
    combine,
    keep_sample_losses,
    places_of,
    slice_sums,
    write_gradient,
)
from argonne.tp.plan import TensorParallelPlan
from argonne.tp.precision import autocast_dtype
from argonne.tp.regions import SequenceState, copy_to_region, gather_sequence

CHUNK_BYTES = 256 << 20
"""Most bytes of logits in a chunk whose tokens nobody has counted."""


def chunk_tokens(asked: int | None, local_vocab_size: int, element_bytes: int) -> int:
    """Tokens whose logits are held at a time: ``asked``, or (None) as many as `CHUNK_BYTES` take."""
    return asked or max(1, CHUNK_BYTES // (local_vocab_size * element_bytes))


@dataclass(eq=False)
class _Work:
    """One forward pass: operands in the compute dtype, and the gradients as they grow."""

    hidden: Tensor
    """(tokens, hidden_size)"""
    matrix: Tensor
    """(local_vocab_size, hidden_size)"""
    places: Places
    rule: LossRule
    chunk: int
    grads: tuple[bool, bool]
    """Whether hidden states and weight want a gradient."""
    grad_hidden: Tensor | None = field(default=None, init=False)
    grad_weight: Tensor | None = field(default=None, init=False)

    def chunks(self) -> list[slice]:
        return [slice(first, first + self.chunk) for first in range(0, len(self.hidden), self.chunk)]

    def logits(self, rows: slice) -> Tensor:
        return times_transposed(self.hidden[rows], self.matrix)

    def add_gradient(self, rows: slice, logits: Tensor, log_normalizer: Tensor) -> None:
        """Take the chunk's part of both gradients; ``logits`` are overwritten by their own gradient."""
        write_gradient(logits, logits, self.places.of(rows), log_normalizer[rows], None, self.rule)
        wide = log_normalizer.dtype
        if self.grads[0]:
            if self.grad_hidden is None:
                self.grad_hidden = torch.empty_like(self.hidden)
            self.grad_hidden[rows] = matrix_product(logits, self.matrix)
        if self.grads[1]:
            across = logits.t()
            if self.grad_weight is None:
                self.grad_weight = matrix_product(across, self.hidden[rows]).to(wide)
            elif logits.dtype == wide:
                self.grad_weight = add_matrix_product(self.grad_weight, across, self.hidden[rows])
            else:  # sums over chunks in the wider dtype: a token more must not round what is there
                self.grad_weight += matrix_product(across, self.hidden[rows])

    def losses(self) -> Tensor:
        """Each token's loss (tokens,); the gradients of their sum on the way."""
        if self.rule.group.size == 1:
            return torch.cat([self._of_whole_vocabulary(rows) for rows in self.chunks()])
        kept = None
        parts: list[tuple[Tensor, Tensor]] = []
        for rows in self.chunks():
            kept = None  # before the next chunk's logits are there
            kept = self.logits(rows)
            parts.append(slice_sums(kept, self.places.of(rows), self.rule))
        largest, sums = (torch.cat(both, dim=-1) for both in zip(*parts, strict=True))
        losses, log_normalizer = combine(largest, sums, self.places, self.rule)
        if any(self.grads):
            for rows in reversed(self.chunks()):  # the last chunk's logits are still there
                logits = self.logits(rows) if kept is None else kept
                kept = None
                self.add_gradient(rows, logits, log_normalizer)
                del logits
        return losses

    def _of_whole_vocabulary(self, rows: slice) -> Tensor:
        """As `losses`, of one chunk on one rank: its logits are made once."""
        places, logits = self.places.of(rows), self.logits(rows)
        losses, log_normalizer = combine(*slice_sums(logits, places, self.rule), places, self.rule)
        if any(self.grads):
            whole = torch.empty(len(self.hidden), dtype=self.rule.dtype, device=logits.device)
            whole[rows] = log_normalizer
            self.add_gradient(rows, logits, whole)
        return losses


class _HeadLoss(torch.autograd.Function):
    """The sum of the losses of hidden states (tokens, hidden_size), and each token's (no gradient).

    The gradients are those of the sum, unscaled: divided by the number of tokens in the forward pass already,
    they would vanish in float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rule: LossRule,
        asked: int | None,
        dtype: torch.dtype,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(differentiable and needed for needed in ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Work(
                hidden=hidden.to(dtype),
                matrix=weight.detach().to(dtype),
                places=places_of(targets, rule),
                rule=rule,
                chunk=chunk_tokens(asked, weight.shape[0], dtype.itemsize),
                grads=(needs[0], needs[1]),
            )
            losses = work.losses()
        ctx.save_for_backward(work.grad_hidden, work.grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the head's gradient may be gigabytes. Autograd refuses a second backward
        # pass over the same graph by the tensors' versions.
        scaled = [
            None if grad is None else grad.mul_(grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], *(None,) * 5


def head_loss(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    rule: LossRule,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and each token's without a gradient, from hidden states and the head's slice.

    Args:
        hidden_states: (..., hidden_size), what the head is given, equal on all ranks. Its gradient is this
            rank's part of the sum over the group (`argonne.tp.regions.copy_to_region`).
        weight: (local_vocab_size, hidden_size).
        targets: (...), ids in the whole vocabulary or the rule's ``ignore_index``, equal on all ranks.
        chunk: tokens whose logits are held at a time; None: as many as `CHUNK_BYTES` take.

    Raises:
        IndexError: a target outside the vocabulary, on the CPU.
    """
    check_targets(targets, rule.vocab_size, rule.ignore_index)
    dtype = autocast_dtype(hidden_states) or hidden_states.dtype
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    total, losses = _HeadLoss.apply(
        rows, weight, targets.reshape(-1), rule, chunk, dtype, torch.is_grad_enabled()
    )
    return total, losses.view(targets.shape)


def attach_head_loss(
    model: nn.Module,
    plan: TensorParallelPlan,
    group: TPGroup,
    head_sequence: SequenceState,
    chunk: int | None,
) -> None:
    """Set the ``head_loss`` that a model's forward pass calls in place of head and loss function."""
    vocab_size = model.get_submodule(plan.embedding).num_embeddings
    assert isinstance(vocab_size, int)

    def whole_head_loss(
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        num_items_in_batch: Tensor | int | None = None,
        logit_softcap: float = 0.0,
        z_loss_weight: float = 0.0,
    ) -> Tensor:
        """The mean over the targets that are not ignored, or the sum over ``num_items_in_batch``."""
        if head_sequence.enabled:
            hidden_states = gather_sequence(hidden_states, group, head_sequence.seq_len)
        else:
            hidden_states = copy_to_region(hidden_states, group)
        rule = LossRule.on(
            group, weight.shape[0], vocab_size, hidden_states.dtype,
            logit_softcap=logit_softcap, z_loss_weight=z_loss_weight,
        )  # fmt: skip
        total, losses = head_loss(hidden_states, weight, targets, rule, chunk=chunk)
        keep_sample_losses(model, losses)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORE_INDEX).sum()
        return total / num_items_in_batch

    model.head_loss = whole_head_loss  # type: ignore[assignment]
