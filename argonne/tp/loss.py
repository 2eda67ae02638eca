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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argonne.tp.group import TPGroup
from argonne.tp.plan import TensorParallelPlan

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 1 << 24
"""Most logits held in the loss's own precision at any time."""


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_chunks(logits: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]


def _capped(logits: Tensor, dtype: torch.dtype, cap: float) -> Tensor:
    """A copy of the logits in ``dtype``, soft-capped where ``cap`` is not 0."""
    copy = logits.to(dtype, copy=True)
    return copy.div_(cap).tanh_().mul_(cap) if cap else copy


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token losses (tokens,) from logits (tokens, local_vocab); gradient entirely local.

    With c(x) the capped logits, p their softmax, y the target, z = logsumexp(c) and w the z-loss weight:
    loss = z - c_y + w z^2, d loss / d x_j = (p_j (1 + 2 w z) - [j = y]) (1 - (c_j / cap)^2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: TPGroup,
        vocab_start: int,
        valid: int,
        ignore_index: int,
        cap: float,
        z_loss_weight: float,
    ) -> Tensor:
        dtype = _loss_dtype(logits)
        rows = logits.shape[0]
        held = logits[:, :valid]
        if valid:
            largest = _capped(held.amax(dim=1), dtype, cap)
        else:
            largest = torch.full((rows,), -torch.inf, dtype=dtype, device=logits.device)
        largest = group.all_reduce(largest, "max")

        ignored = targets == ignore_index
        local_target = targets - vocab_start
        mine = (local_target >= 0) & (local_target < valid) & ~ignored
        local_target = torch.where(mine, local_target, 0)

        sums = torch.zeros((2, rows), dtype=dtype, device=logits.device)
        if valid:
            for chunk in _row_chunks(held):
                sums[0, chunk] = _capped(held[chunk], dtype, cap).sub_(largest[chunk, None]).exp_().sum(dim=1)
            picked = _capped(held.gather(1, local_target[:, None]).squeeze(1), dtype, cap) - largest
            sums[1] = torch.where(mine, picked, 0.0)
        sums = group.all_reduce(sums, owned=True)

        log_sum = sums[0].log()
        log_normalizer = largest + log_sum
        loss = log_sum - sums[1]
        if z_loss_weight:
            loss = loss + z_loss_weight * log_normalizer.square()
        ctx.save_for_backward(logits, log_normalizer, local_target, mine, ignored)
        ctx.valid, ctx.cap, ctx.z_loss_weight = valid, cap, z_loss_weight
        return torch.where(ignored, torch.zeros((), dtype=dtype, device=logits.device), loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_normalizer, local_target, mine, ignored = ctx.saved_tensors
        valid = ctx.valid
        weight = torch.where(ignored, 0.0, grads[0])
        grad = torch.empty_like(logits)
        grad[:, valid:] = 0
        dtype, cap = log_normalizer.dtype, ctx.cap
        in_place = grad.dtype == dtype
        for chunk in _row_chunks(logits):
            normalizer = log_normalizer[chunk, None]
            part = grad[chunk, :valid] if in_place else logits[chunk, :valid].to(dtype)
            slope = None
            if cap:
                capped = _capped(logits[chunk, :valid], dtype, cap)
                slope = (capped / cap).square_().neg_().add_(1.0)
                torch.sub(capped, normalizer, out=part).exp_()
            else:
                torch.sub(logits[chunk, :valid], normalizer, out=part).exp_()
            if ctx.z_loss_weight:
                part.mul_(1.0 + 2.0 * ctx.z_loss_weight * normalizer)
            if valid:
                part.scatter_add_(1, local_target[chunk, None], -mine[chunk, None].to(part.dtype))
            if slope is not None:
                part.mul_(slope)
            part.mul_(weight[chunk, None])
            # An ignored row may hold a non-finite logit that must not reach the gradient as NaN * 0. Asking
            # whether there is one costs more than the pass on a GPU.
            if part.device.type != "cpu" or bool(ignored[chunk].any()):
                part.masked_fill_(ignored[chunk, None], 0.0)
            if not in_place:
                grad[chunk, :valid] = part.to(grad.dtype)
        return grad, *(None,) * 7


def _check(logits: Tensor, targets: Tensor, total: int, ignore_index: int, reduction: str) -> None:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; use 'none', 'sum' or 'mean'")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not match")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ((targets < 0) | (targets >= total)) & (targets != ignore_index)
        if bool(outside.any()):
            raise IndexError(f"a target is outside the vocabulary of {total}")


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
    _check(logits, targets, total, ignore_index, reduction)
    flat_targets = targets.reshape(-1)
    vocab_start = group.rank * local_vocab_size
    valid = max(0, min(local_vocab_size, total - vocab_start))
    rows = logits.reshape(-1, local_vocab_size)
    layout = (group, vocab_start, valid, ignore_index)
    losses = _VocabParallelCrossEntropy.apply(rows, flat_targets, *layout, logit_softcap, z_loss_weight)
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
