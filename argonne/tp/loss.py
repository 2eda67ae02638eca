"""Cross entropy on vocabulary slices.

The logits of one token lie on all ranks of the tensor-parallel group, a slice of the vocabulary each.
One max and one stacked sum are reduced; full logits are never gathered, and full-precision copies are
made a few hundred rows at a time. (Megatron-LM, Shoeybi et al. 2019, section 3.)

Soft-capped logits, cap * tanh(logits / cap), and the z-loss, weight * logsumexp(logits) ** 2 a token, are
computed here from the raw logits, so that no second copy of a slice is kept for the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argonne.tp.group import TPGroup
from argonne.tp.plan import TensorParallelPlan
from argonne.tp.precision import can_be_read

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 1 << 24
"""Most logits held in the loss's own precision at any time."""


def row_chunks(logits: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]


def capped(logits: Tensor, dtype: torch.dtype, cap: float) -> Tensor:
    """A copy of the logits in ``dtype``, soft-capped where ``cap`` is not 0."""
    copy = logits.to(dtype, copy=True)
    return copy.div_(cap).tanh_().mul_(cap) if cap else copy


@dataclass(frozen=True, kw_only=True)
class LossRule:
    """Which part of the vocabulary a rank holds, and which loss is computed."""

    group: TPGroup
    vocab_size: int
    start: int
    """First id of this rank's slice."""
    valid: int
    """Entries of the slice that are not padding."""
    dtype: torch.dtype
    """In which the loss is computed."""
    ignore_index: int = IGNORE_INDEX
    cap: float = 0.0
    z_loss_weight: float = 0.0

    @classmethod
    def on(
        cls,
        group: TPGroup,
        local_vocab_size: int,
        vocab_size: int,
        logits_dtype: torch.dtype,
        *,
        ignore_index: int = IGNORE_INDEX,
        logit_softcap: float = 0.0,
        z_loss_weight: float = 0.0,
    ) -> LossRule:
        """For slices of equal size in rank order, the last ones padded."""
        start = group.rank * local_vocab_size
        return cls(
            group=group,
            vocab_size=vocab_size,
            start=start,
            valid=max(0, min(local_vocab_size, vocab_size - start)),
            dtype=torch.float64 if logits_dtype == torch.float64 else torch.float32,
            ignore_index=ignore_index,
            cap=logit_softcap,
            z_loss_weight=z_loss_weight,
        )


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the targets (rows,) of some tokens lie in this rank's slice."""

    local: Tensor
    """Index in the slice; 0 where the target is not in it."""
    mine: Tensor
    """Whether it is in the slice."""
    ignored: Tensor

    def of(self, rows: slice) -> Places:
        """Those of some rows."""
        return Places(local=self.local[rows], mine=self.mine[rows], ignored=self.ignored[rows])


def places_of(targets: Tensor, rule: LossRule) -> Places:
    """For targets (rows,) in the whole vocabulary."""
    ignored = targets == rule.ignore_index
    local = targets - rule.start
    mine = (local >= 0) & (local < rule.valid) & ~ignored
    return Places(local=torch.where(mine, local, 0), mine=mine, ignored=ignored)


def slice_sums(logits: Tensor, places: Places, rule: LossRule) -> tuple[Tensor, Tensor]:
    """The largest capped logit (rows,) of this slice, and (2, rows): the sum of exp(logit - largest), and
    the target's logit where it is in the slice."""
    rows, held = logits.shape[0], logits[:, : rule.valid]
    sums = torch.zeros((2, rows), dtype=rule.dtype, device=logits.device)
    if not rule.valid:
        return torch.full((rows,), -torch.inf, dtype=rule.dtype, device=logits.device), sums
    largest = capped(held.amax(dim=1), rule.dtype, rule.cap)
    base = largest.clamp_min(torch.finfo(rule.dtype).min)  # a slice may forbid all of its ids: -inf
    for chunk in row_chunks(held):
        if rule.cap:
            part = capped(held[chunk], rule.dtype, rule.cap).sub_(base[chunk, None])
        else:
            part = held[chunk] - base[chunk, None]  # widened on the way
        sums[0, chunk] = part.exp_().sum(dim=1)
    picked = capped(held.gather(1, places.local[:, None]).squeeze(1), rule.dtype, rule.cap)
    sums[1] = torch.where(places.mine, picked, 0.0)
    return largest, sums


def combine(largest: Tensor, sums: Tensor, places: Places, rule: LossRule) -> tuple[Tensor, Tensor]:
    """Each token's loss and log-normaliser (rows,) from what `slice_sums` gave on every rank.

    One max and one stacked sum over the group. ``sums`` is overwritten.
    """
    overall = rule.group.all_reduce(largest, "max")
    if rule.group.size > 1:
        sums[0].mul_((largest - overall).exp_())
    # Beside the overall maximum, so that what is summed is small.
    sums[1] = torch.where(places.mine, sums[1] - overall, 0.0)
    sums = rule.group.all_reduce(sums, owned=True)
    log_sum = sums[0].log()
    log_normalizer = overall + log_sum
    loss = log_sum - sums[1]
    if rule.z_loss_weight:
        loss = loss + rule.z_loss_weight * log_normalizer.square()
    return loss.masked_fill(places.ignored, 0.0), log_normalizer


def write_gradient(
    logits: Tensor,
    into: Tensor,
    places: Places,
    log_normalizer: Tensor,
    weight: Tensor | None,
    rule: LossRule,
) -> None:
    """Write the gradient of the sum of ``weight`` x loss into a tensor like ``logits``, or into them.

    With c(x) the capped logits, p their softmax, y the target, z = logsumexp(c) and w the z-loss weight:
    d loss / d x_j = (p_j (1 + 2 w z) - [j = y]) (1 - (c_j / cap)^2).
    """
    valid, dtype, cap = rule.valid, rule.dtype, rule.cap
    into[:, valid:] = 0
    in_place = into.dtype == dtype
    if not (in_place or cap or rule.z_loss_weight or weight is not None):
        _write_plain_gradient(logits, into, places, log_normalizer, rule)
        return
    for chunk in row_chunks(logits):
        normalizer, mine = log_normalizer[chunk, None], places.mine[chunk, None]
        held, ignored = logits[chunk, :valid], places.ignored[chunk]
        slope = None
        if cap:
            held = capped(held, dtype, cap)
            slope = (held / cap).square_().neg_().add_(1.0)
        part = into[chunk, :valid] if in_place else torch.empty(held.shape, dtype=dtype, device=held.device)
        torch.sub(held, normalizer, out=part).exp_()
        if rule.z_loss_weight:
            part.mul_(1.0 + 2.0 * rule.z_loss_weight * normalizer)
        if valid:
            part.scatter_add_(1, places.local[chunk, None], -mine.to(part.dtype))
        if slope is not None:
            part.mul_(slope)
        if weight is not None:
            part.mul_(weight[chunk, None])
        # An ignored row may hold a non-finite logit that must not reach the gradient as NaN * 0. Asking
        # whether there is one costs more than the pass on a GPU.
        if not can_be_read(ignored) or bool(ignored.any()):
            part.masked_fill_(ignored[:, None], 0.0)
        if not in_place:
            into[chunk, :valid] = part.to(into.dtype)


def _write_plain_gradient(
    logits: Tensor, into: Tensor, places: Places, log_normalizer: Tensor, rule: LossRule
) -> None:
    """As `write_gradient` for a narrower ``into`` and nothing but cross entropy: the same numbers, rounded
    as the exponential is written, with the targets' own beside it."""
    valid = rule.valid
    if not valid:
        return
    for chunk in row_chunks(logits):
        held, normalizer = logits[chunk, :valid], log_normalizer[chunk, None]
        index = places.local[chunk, None]
        of_targets = (held.gather(1, index) - normalizer).exp_()
        of_targets -= places.mine[chunk, None].to(rule.dtype)
        part = into[chunk, :valid]
        torch.exp(held - normalizer, out=part)
        part.scatter_(1, index, of_targets.to(part.dtype))  # where a target is elsewhere, what is there
        part.masked_fill_(places.ignored[chunk, None], 0.0)  # also of a logit that is not finite


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token losses (tokens,) from logits (tokens, local_vocab); gradient entirely local."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rule: LossRule) -> Tensor:
        places = places_of(targets, rule)
        losses, log_normalizer = combine(*slice_sums(logits, places, rule), places, rule)
        ctx.save_for_backward(logits, log_normalizer, places.local, places.mine, places.ignored)
        ctx.rule = rule
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_normalizer, local, mine, ignored = ctx.saved_tensors
        places = Places(local=local, mine=mine, ignored=ignored)
        weight = torch.where(ignored, 0.0, grads[0])
        grad = torch.empty_like(logits)
        write_gradient(logits, grad, places, log_normalizer, weight, ctx.rule)
        return grad, None, None


def check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise IndexError for a target outside the vocabulary; on the CPU, where it costs no waiting."""
    if can_be_read(targets):
        outside = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
        if bool(outside.any()):
            raise IndexError(f"a target is outside the vocabulary of {vocab_size}")


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    group: TPGroup,
    *,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    logit_softcap: float = 0.0,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """Cross entropy of logits whose last dimension is this rank's slice of the vocabulary.

    Args:
        logits: (..., local_vocab_size); rank r holds the entries from r * local_vocab_size on. Any floating
            dtype; the loss is computed in float32 (float64 for float64 logits).
        targets: (...), int64 ids in the whole vocabulary, equal on all ranks, or ``ignore_index``.
        group: the tensor-parallel group.
        vocab_size: size of the whole vocabulary; entries of the slices beyond it are padding, which the
            loss ignores. None: local_vocab_size * group.size.
        reduction: "none", "sum" or "mean" (over the targets that are not ignored; NaN when all are, as
            ``torch.nn.functional.cross_entropy`` gives; the gradient is zero then).
        logit_softcap: cap of the logits, applied here; 0: none.
        z_loss_weight: weight of the squared log-normalizer that is added to each token's loss.

    Returns:
        The loss, equal on all ranks. Its gradient with respect to ``logits`` needs no communication.

    Raises:
        ValueError: unknown reduction, or shapes that do not match.
        IndexError: a target outside the vocabulary.
    """
    local_vocab_size = logits.shape[-1]
    total = local_vocab_size * group.size if vocab_size is None else vocab_size
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; use 'none', 'sum' or 'mean'")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not match")
    check_targets(targets, total, ignore_index)
    flat_targets = targets.reshape(-1)
    rule = LossRule.on(
        group, local_vocab_size, total, logits.dtype,
        ignore_index=ignore_index, logit_softcap=logit_softcap, z_loss_weight=z_loss_weight,
    )  # fmt: skip
    losses = _VocabParallelCrossEntropy.apply(logits.reshape(-1, local_vocab_size), flat_targets, rule)
    if reduction == "none":
        return losses.view(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (flat_targets != ignore_index).sum()


def keep_sample_losses(model: nn.Module, losses: Tensor) -> None:
    """Keep the sum of each sample's losses, from those of its tokens (batch, seq_len), of a forward pass.

    ``model.sample_losses`` (batch,), without a gradient, tells samples apart where the mean does not.
    """
    model.sample_losses = losses.detach().sum(dim=-1)


def attach_loss(model: nn.Module, plan: TensorParallelPlan, group: TPGroup) -> None:
    """Set the ``loss_function`` that a model's forward pass calls; at size 1 too, for its memory.

    It refuses arguments that it does not know (TypeError) where the model's own does: transformers' models
    hand theirs whatever their forward pass was called with.
    """
    tolerant = _takes_any_keyword(getattr(model, "loss_function", None))
    vocab_size = model.get_submodule(plan.embedding).num_embeddings
    assert isinstance(vocab_size, int)

    def loss_function(
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int = vocab_size,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        logit_softcap: float = 0.0,
        z_loss_weight: float = 0.0,
        **unknown: Any,
    ) -> Tensor:
        """As transformers' causal language model loss: labels are shifted here, shift_labels already are."""
        if unknown and not tolerant:
            raise TypeError(f"the loss does not know the argument {', '.join(sorted(unknown))}")
        if shift_labels is None:
            if labels is None:
                raise ValueError("a loss needs labels or shift_labels")
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        losses = vocab_parallel_cross_entropy(
            logits,
            shift_labels,
            group,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            reduction="none",
            logit_softcap=logit_softcap,
            z_loss_weight=z_loss_weight,
        )
        keep_sample_losses(model, losses)
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != ignore_index).sum()
        elif isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch

    model.loss_function = loss_function  # type: ignore[assignment]


def _takes_any_keyword(function: Callable[..., Any] | None) -> bool:
    if function is None:
        return False
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds
