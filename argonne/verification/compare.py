"""The run's own model against the unsharded model, a block at a time: ``--verify-sharding``.

Also how a difference is measured. Nothing here prints.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from argonne.errors import RunError
from argonne.ranks.replicas import forward_context, local_gradients
from argonne.ranks.world import Parallel
from model import (
    ArgonneBlock,
    ArgonneModel,
    ArgonneRMSNorm,
    causal_lm_loss,
    document_starts,
    rotary_frequencies,
    rotary_tables,
)
from tp_shard import TensorParallelState, gather_unsharded

_NEGLIGIBLE = 1e-6
"""A gradient this small beside the global norm is zero in theory: its error is measured against that."""


class SplitMismatchError(RunError):
    """The split model does not compute what the unsharded model computes."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one tensor (or number) is from its reference."""

    name: str
    maximum: float
    """Largest absolute difference of an element."""
    relative: float
    """||actual - expected|| / ||expected||; infinite where a value is not finite."""


def relative_error(error: float, norm: float, whole: float) -> float:
    """``error / norm``, or against ``whole`` (the norm of all gradients) where ``norm`` is zero in theory."""
    base = norm if norm > _NEGLIGIBLE * whole else whole
    if not math.isfinite(error) or not math.isfinite(base):
        return math.inf
    return error / base if base > 0 else 0.0 if error == 0 else math.inf


def difference(name: str, actual: Tensor, expected: Tensor, whole: float = 0.0) -> Difference:
    """The difference of two tensors; ``whole`` as in `relative_error`."""
    error = actual.double() - expected.double()
    relative = relative_error(error.norm().item(), expected.double().norm().item(), whole)
    maximum = error.abs().max().item() if error.numel() else 0.0
    return Difference(name=name, maximum=maximum if math.isfinite(maximum) else math.inf, relative=relative)


# ---------------------------------------------------------------------------------------------------
# The comparison of a run's model

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative error of a gradient, by the run's compute dtype; the reference is computed in the weights' own.

Faults of a split are 4e-1 and more (a missing reduction), or a whole slice. Float32 rounding through tens of
layers stays below 1e-5, leaving room for another kernel; 16-bit rounding reaches a few per cent.
"""
_FP16_LOSS_SCALE = 4096.0


@dataclass(frozen=True, kw_only=True)
class ShardingReport:
    """What `compare_with_unsharded` found; equal on all ranks."""

    loss: float
    unsharded_loss: float
    gradients: tuple[Difference, ...]
    tolerance: float

    @property
    def worst(self) -> Difference:
        """The gradient that is furthest off, relatively."""
        return max(self.gradients, key=lambda gradient: gradient.relative)

    @property
    def loss_error(self) -> float:
        """Relative difference of the losses."""
        error = abs(self.loss - self.unsharded_loss)
        return relative_error(error, abs(self.unsharded_loss), abs(self.unsharded_loss))

    @property
    def agrees(self) -> bool:
        """Whether loss and every gradient are within the tolerance."""
        return self.loss_error <= self.tolerance and self.worst.relative <= self.tolerance

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"loss {self.loss:.6f} split, {self.unsharded_loss:.6f} unsharded; "
            f"{len(self.gradients)} gradients, largest relative error {self.worst.relative:.2e} "
            f"({self.worst.name}), tolerance {self.tolerance:.0e}"
        )


def compare_with_unsharded(
    model: ArgonneModel,
    wrapped: nn.Module,
    parallel: Parallel,
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    document_ids: Tensor | None = None,
) -> ShardingReport:
    """One batch through the model as the run built it and through the unsharded model; compare gradients.

    The unsharded model exists one block at a time: its weights are gathered over the ranks, the forward pass
    keeps the blocks' inputs, and the backward pass gathers each block again. The largest thing held is the
    embedding, twice, and its gradient. Gradients of ``model`` are cleared at the end. Collective; call it
    before ``torch.compile``, or with tokens of the training shape.

    Args:
        model: a sharded ArgonneModel, under FSDP or not, blocks recomputed or not.
        wrapped: what the training loop calls: ``model`` itself or its DDP wrapper.
        parallel: the run's degrees and groups.
        tokens: (batch, seq_len + 1) ids, the same on every rank.
        dtype: the run's compute dtype.
        document_ids: (batch, seq_len), with document attention; the same on every rank.

    Raises:
        SplitMismatchError: on all ranks, where the loss or a gradient is off by more than `TOLERANCES`.
    """
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    counters, saved = state.group.counters, copy.deepcopy(state.group.counters)
    tokens = tokens.to(parallel.device)
    scale = _FP16_LOSS_SCALE if dtype is torch.float16 else 1.0
    context = forward_context(parallel, dtype, sharded=isinstance(model, FSDPModule))
    wrapped.zero_grad(set_to_none=True)
    within = {} if document_ids is None else {"document_ids": document_ids.to(parallel.device)}
    with context():
        loss = wrapped(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], **within).loss
    (loss * scale).backward()
    state.sum_partial_gradients(local_gradients(model))

    tally = _Tally(model, state, scale)
    unsharded_loss = _walk_unsharded(model, tokens, tally, **within)
    wrapped.zero_grad(set_to_none=True)
    counters.calls, counters.bytes = saved.calls, saved.bytes
    report = ShardingReport(
        loss=loss.item(),
        unsharded_loss=unsharded_loss,
        gradients=tally.differences(parallel),
        tolerance=TOLERANCES[dtype],
    )
    return _agreeing(report)


def _agreeing(report: ShardingReport) -> ShardingReport:
    if not report.agrees:
        raise SplitMismatchError(
            f"the split model is not the unsharded model (--verify-sharding): {report.summary()}; "
            "do not train with this build; find the fault with scripts/verify_tensor_parallel.py"
        )
    return report


def tp_local(tensor: Tensor) -> Tensor:
    """This tensor-parallel rank's whole slice, gathered over the replicas that FSDP has cut it over."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Tally:
    """Gathers weights and compares gradients, one parameter at a time."""

    def __init__(self, model: ArgonneModel, state: TensorParallelState, scale: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._state, self._scale = state, scale
        self._rows: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """The unsharded weight; collective."""
        name = name if name in self._parameters else "embed_tokens.weight"
        return gather_unsharded(tp_local(self._parameters[name].detach()), name, self._state)

    def is_tied(self, name: str) -> bool:
        """Whether the weight is another one's: a tied head."""
        return name not in self._parameters

    def compare(self, name: str, expected: Tensor) -> None:
        """Take note of how far this rank's gradient is from the unsharded one; collective."""
        grad = self._parameters[name].grad
        assert grad is not None, f"{name} has no gradient"
        local = tp_local(grad)
        owned = torch.zeros((), dtype=torch.float64, device=local.device)
        held, maximum = owned.clone(), owned.clone()
        for box in self._state.slice_map.rectangles(name, self._state.group.rank):
            error = local[box.local_index].float() / self._scale - expected[box.unsharded_index]
            square = error.double().square().sum()
            held += square
            owned += square * box.owned
            maximum = torch.maximum(maximum, error.abs().max())
        self._rows[name] = torch.stack([owned, held, maximum, expected.double().square().sum()])

    def differences(self, parallel: Parallel) -> tuple[Difference, ...]:
        """All comparisons, over all ranks: errors of what is owned, and of the worst copy."""
        names = [name for name in self._parameters if name in self._rows]
        assert len(names) == len(self._parameters), "a parameter was not compared"
        rows = torch.stack([self._rows[name] for name in names]).cpu().nan_to_num(nan=math.inf)
        owned, worst = rows[:, 0].clone(), rows[:, 1:3].clone()
        if parallel.control_group is not None:
            dist.all_reduce(owned, group=parallel.control_group)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=parallel.control_group)
            owned /= parallel.dp_size
        errors = torch.maximum(owned, worst[:, 0]).sqrt()
        norms = rows[:, 3].sqrt()
        total = rows[:, 3].sum().sqrt().item()
        return tuple(
            Difference(name=name, maximum=largest, relative=relative_error(error, norm, total))
            for name, error, largest, norm in zip(
                names, errors.tolist(), worst[:, 1].tolist(), norms.tolist(), strict=True
            )
        )


def _walk_unsharded(
    model: ArgonneModel, tokens: Tensor, tally: _Tally, document_ids: Tensor | None = None
) -> float:
    """Forward and backward pass of the unsharded model, a block at a time; returns its loss."""
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        hidden = F.embedding(ids, tally.weight("embed_tokens.weight"))
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = rotary_tables(rotary_frequencies(model.config), positions, hidden.dtype)
    documents = None if document_ids is None else document_starts(document_ids)
    entered = []
    for index in range(len(model.blocks)):
        entered.append(hidden)
        with torch.no_grad():
            hidden = _gathered_block(model, index, tally)(hidden, rotary, documents=documents)

    loss, grad, head_grad = _unsharded_head(model, hidden, targets, tally)
    for index in reversed(range(len(model.blocks))):
        block = _gathered_block(model, index, tally)
        hidden = entered.pop().requires_grad_()
        names, parameters = zip(*block.named_parameters(), strict=True)
        left = block(hidden, rotary, documents=documents)
        grad, *weight_grads = torch.autograd.grad(left, [hidden, *parameters], grad)
        for name, weight_grad in zip(names, weight_grads, strict=True):
            tally.compare(f"blocks.{index}.{name}", weight_grad)

    embedding_grad = torch.zeros(model.embed_tokens.num_embeddings, grad.shape[-1]).to(grad)
    embedding_grad.index_add_(0, ids.reshape(-1), grad.flatten(0, 1))
    if head_grad is not None:
        embedding_grad += head_grad
    tally.compare("embed_tokens.weight", embedding_grad)
    return loss


def _gathered_block(model: ArgonneModel, index: int, tally: _Tally) -> ArgonneBlock:
    with torch.device("meta"):
        block = ArgonneBlock(model.config, index)
    weights = {name: tally.weight(f"blocks.{index}.{name}") for name, _ in block.named_parameters()}
    block.load_state_dict(weights, assign=True)
    return block.requires_grad_()


def _unsharded_head(
    model: ArgonneModel, hidden: Tensor, targets: Tensor, tally: _Tally
) -> tuple[float, Tensor, Tensor | None]:
    """Final norm, head and loss: the loss, the gradient of ``hidden``, and of the head where it is tied."""
    hidden = hidden.requires_grad_()
    config = model.config
    norm = ArgonneRMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = nn.Parameter(tally.weight("norm.weight"))
    head = tally.weight("lm_head.weight").requires_grad_()
    loss = causal_lm_loss(
        F.linear(norm(hidden), head),
        None,
        config.vocab_size,
        shift_labels=targets,
        logit_softcap=config.logit_softcap,
        z_loss_weight=config.z_loss_weight,
    )
    grad, norm_grad, head_grad = torch.autograd.grad(loss, [hidden, norm.weight, head])
    tally.compare("norm.weight", norm_grad)
    if tally.is_tied("lm_head.weight"):
        return loss.item(), grad, head_grad
    tally.compare("lm_head.weight", head_grad)
    return loss.item(), grad, None
