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
from typing import Any, Protocol

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


class TokenLoss(Protocol):
    """A loss of each token, in the three parts that vocabulary slices and chunks of tokens ask for."""

    rule: LossRule

    def slice_sums(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of some tokens and this rank's logits of them: what is maximised over the group (..., rows), and
        what is then summed (n, rows)."""

    def combine(self, rows: slice, largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """From both, by one max and one sum over the group: the losses (n, rows), of which the first is
        trained on, and what `write_gradient` needs (..., rows)."""

    def write_gradient(self, rows: slice, logits: Tensor, kept: Tensor) -> None:
        """Overwrite the logits with the gradient of the sum of the first of the losses."""


class SoftTargets(Protocol):
    """What else than the next token a micro-batch is trained on: a teacher's word on it."""

    def token_loss(self, places: Places, rule: LossRule) -> TokenLoss:
        """The loss of its tokens."""


@dataclass(frozen=True)
class PlainLoss:
    """Cross entropy, with the z-loss where there is one."""

    places: Places
    rule: LossRule

    def slice_sums(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        return slice_sums(logits, self.places.of(rows), self.rule)

    def combine(self, rows: slice, largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        losses, log_normalizer = combine(largest, sums, self.places.of(rows), self.rule)
        return losses[None], log_normalizer

    def write_gradient(self, rows: slice, logits: Tensor, kept: Tensor) -> None:
        write_gradient(logits, logits, self.places.of(rows), kept, None, self.rule)


@dataclass(eq=False)
class _Work:
    """One forward pass: operands in the compute dtype, and the gradients as they grow."""

    hidden: Tensor
    """(tokens, hidden_size)"""
    matrix: Tensor
    """(local_vocab_size, hidden_size)"""
    loss: TokenLoss
    chunk: int
    grads: tuple[bool, bool]
    """Whether hidden states and weight want a gradient."""
    grad_hidden: Tensor | None = field(default=None, init=False)
    grad_weight: Tensor | None = field(default=None, init=False)

    def chunks(self) -> list[slice]:
        return [slice(first, first + self.chunk) for first in range(0, len(self.hidden), self.chunk)]

    def logits(self, rows: slice) -> Tensor:
        return times_transposed(self.hidden[rows], self.matrix)

    def add_gradient(self, rows: slice, logits: Tensor, kept: Tensor) -> None:
        """Take the chunk's part of both gradients; ``logits`` are overwritten by their own gradient."""
        self.loss.write_gradient(rows, logits, kept)
        wide = self.loss.rule.dtype
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
        """Each token's losses (n, tokens); the gradients of the sum of the first on the way."""
        if self.loss.rule.group.size == 1:
            return torch.cat([self._of_whole_vocabulary(rows) for rows in self.chunks()], dim=-1)
        logits = None
        parts: list[tuple[Tensor, Tensor]] = []
        for rows in self.chunks():
            logits = None  # before the next chunk's logits are there
            logits = self.logits(rows)
            parts.append(self.loss.slice_sums(rows, logits))
        largest, sums = (torch.cat(both, dim=-1) for both in zip(*parts, strict=True))
        losses, kept = self.loss.combine(slice(None), largest, sums)
        if any(self.grads):
            for rows in reversed(self.chunks()):  # the last chunk's logits are still there
                logits = self.logits(rows) if logits is None else logits
                self.add_gradient(rows, logits, kept[..., rows])
                logits = None
        return losses

    def _of_whole_vocabulary(self, rows: slice) -> Tensor:
        """As `losses`, of one chunk on one rank: its logits are made once."""
        logits = self.logits(rows)
        losses, kept = self.loss.combine(rows, *self.loss.slice_sums(rows, logits))
        if any(self.grads):
            self.add_gradient(rows, logits, kept)
        return losses


class _HeadLoss(torch.autograd.Function):
    """The sum of the losses of hidden states (tokens, hidden_size), and each token's (n, tokens), of which
    the first makes the sum (no gradient).

    The gradients are those of the sum, unscaled: divided by the number of tokens in the forward pass already,
    they would vanish in float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: TokenLoss,
        asked: int | None,
        dtype: torch.dtype,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(differentiable and needed for needed in ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Work(
                hidden=hidden.to(dtype),
                matrix=weight.detach().to(dtype),
                loss=loss,
                chunk=chunk_tokens(asked, weight.shape[0], dtype.itemsize),
                grads=(needs[0], needs[1]),
            )
            losses = work.losses()
        ctx.save_for_backward(work.grad_hidden, work.grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses[0].sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the head's gradient may be gigabytes. Autograd refuses a second backward
        # pass over the same graph by the tensors' versions.
        scaled = [
            None if grad is None else grad.mul_(grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], *(None,) * 4


def head_loss(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    rule: LossRule,
    *,
    chunk: int | None = None,
    soft_targets: SoftTargets | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and each token's (n, ...) without a gradient, from hidden states and the head's
    slice. Of the n losses of a token the first is the one that is summed; without soft targets it is alone.

    Args:
        hidden_states: (..., hidden_size), what the head is given, equal on all ranks. Its gradient is this
            rank's part of the sum over the group (`argonne.tp.regions.copy_to_region`).
        weight: (local_vocab_size, hidden_size).
        targets: (...), ids in the whole vocabulary or the rule's ``ignore_index``, equal on all ranks.
        chunk: tokens whose logits are held at a time; None: as many as `CHUNK_BYTES` take.
        soft_targets: what else the tokens are trained on.

    Raises:
        IndexError: a target outside the vocabulary, on the CPU.
    """
    check_targets(targets, rule.vocab_size, rule.ignore_index)
    dtype = autocast_dtype(hidden_states) or hidden_states.dtype
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    places = places_of(targets.reshape(-1), rule)
    loss = PlainLoss(places, rule) if soft_targets is None else soft_targets.token_loss(places, rule)
    total, losses = _HeadLoss.apply(rows, weight, loss, chunk, dtype, torch.is_grad_enabled())
    return total, losses.view(-1, *targets.shape)


def attach_head_loss(
    model: nn.Module,
    plan: TensorParallelPlan,
    group: TPGroup,
    head_sequence: SequenceState,
    chunk: int | None,
) -> None:
    """Set the ``head_loss`` that a model's forward pass calls in place of head and loss function.

    It trains on ``model.soft_targets`` too where a caller has set them, and then leaves the means of the
    losses that the sum is made of in ``model.loss_parts`` (n - 1,), without a gradient.
    """
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
        soft_targets: Any = model.soft_targets
        total, losses = head_loss(
            hidden_states, weight, targets, rule, chunk=chunk, soft_targets=soft_targets
        )
        keep_sample_losses(model, losses[0])
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORE_INDEX).sum()
        if soft_targets is not None:
            model.loss_parts = losses[1:].flatten(1).sum(dim=1) / num_items_in_batch
        return total / num_items_in_batch

    model.soft_targets = None  # type: ignore[assignment]
    model.head_loss = whole_head_loss  # type: ignore[assignment]
