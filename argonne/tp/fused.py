"""Products that share an entrance or an exit: q, k, v (or gate, up) of one input; an MLP's gated exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from argonne.tp.cpu_products import add_matrix_product, linear, matrix_product, times_transposed
from argonne.tp.group import TPGroup
from argonne.tp.precision import in_compute_dtype
from argonne.tp.regions import (
    SequenceState,
    finish_gather_sequence,
    finish_scatter_sequence,
    start_gather_sequence,
    start_scatter_sequence,
)

if TYPE_CHECKING:
    from argonne.tp.layers import ColumnParallelLinear, RowParallelLinear


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _ColumnProducts(torch.autograd.Function):
    """Products of one input with several column slices: one entrance for all of them.

    Backward: the input gradient's reduction is under way while the weight gradients are computed. With
    sequence parallelism only the local slice of the input is kept, and gathered again meanwhile; compiled
    code keeps the whole, since torch's partitioner would keep the first gather for the second.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: TPGroup, seq_len: int, biased: tuple[bool, ...], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(biased)], iter(parameters[len(biased) :])
        whole = finish_gather_sequence(start_gather_sequence(x, group), group, seq_len) if seq_len else x
        ctx.regathers = seq_len > 0 and not torch.compiler.is_compiling()
        ctx.save_for_backward(x if ctx.regathers else whole, *weights)
        ctx.group, ctx.seq_len, ctx.biased = group, seq_len, biased
        return tuple(
            times_transposed(whole, w, next(biases) if has else None)
            for w, has in zip(weights, biased, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        group: TPGroup = ctx.group
        count = len(weights)
        rows = [_rows(grad) for grad in grads]
        regathered = start_gather_sequence(x, group) if ctx.regathers else None

        grad_x = reducing = None
        if ctx.needs_input_grad[0]:
            grad_x = matrix_product(rows[0], weights[0])
            for grad, weight in zip(rows[1:], weights[1:], strict=True):
                grad_x = add_matrix_product(grad_x, grad, weight)
            grad_x = grad_x.view(*grads[0].shape[:-1], grad_x.shape[-1])
            reducing = (
                start_scatter_sequence(grad_x, group)
                if ctx.seq_len
                else group.start_all_reduce(grad_x, owned=True)
            )

        whole = x if regathered is None else finish_gather_sequence(regathered, group, ctx.seq_len)
        inputs = _rows(whole)
        parameter_needs = ctx.needs_input_grad[4:]
        weight_grads = [
            matrix_product(grad.t(), inputs) if needed else None
            for grad, needed in zip(rows, parameter_needs[:count], strict=True)
        ]
        bias_grads = [grad.sum(0) for grad, has in zip(rows, ctx.biased, strict=True) if has]
        if reducing is not None:
            grad_x = finish_scatter_sequence(reducing, group) if ctx.seq_len else group.wait(reducing)
        return (grad_x, None, None, None, *weight_grads, *bias_grads)


def column_products(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    group: TPGroup,
    sequence: SequenceState | None = None,
) -> tuple[Tensor, ...]:
    """x W_i^T + b_i for the column slices W_i, with the one entrance of a parallel region.

    Args:
        x: (batch, seq_len, in_features), equal on all ranks; with sequence parallelism
            (batch, local_seq_len, in_features).
        weights: (local_out_features_i, in_features) each.
        biases: (local_out_features_i,) or None each.

    Returns:
        (batch, seq_len, local_out_features_i) each.
    """
    operands = in_compute_dtype(x, *weights, *biases)
    cast_weights = operands[1 : 1 + len(weights)]
    cast_biases = operands[1 + len(weights) :]
    if group.size == 1:
        return tuple(linear(operands[0], w, b) for w, b in zip(cast_weights, cast_biases, strict=True))  # type: ignore[arg-type]
    biased = tuple(bias is not None for bias in cast_biases)
    seq_len = sequence.seq_len if sequence is not None and sequence.enabled else 0
    present = [bias for bias in cast_biases if bias is not None]
    return _ColumnProducts.apply(operands[0], group, seq_len, biased, *cast_weights, *present)


class ColumnGroup:
    """Stands in for the method of a block that makes several products of one input (q, k, v; gate, up)."""

    def __init__(
        self, layers: Sequence[ColumnParallelLinear], group: TPGroup, sequence: SequenceState
    ) -> None:
        self.layers = tuple(layers)
        self.group = group
        self.sequence = sequence

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        weights = [layer.matrix for layer in self.layers]
        return column_products(x, weights, [layer.bias for layer in self.layers], self.group, self.sequence)


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) W^T, keeping gate, up and W."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return times_transposed(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        activated = F.silu(gate)
        grad_weight = grad_gate = grad_up = None
        if ctx.needs_input_grad[2]:
            grad_weight = matrix_product(rows.t(), (activated * up).view(-1, gate.shape[-1]))
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            product_grad = matrix_product(rows, weight).view_as(gate)
            grad_up = activated.mul_(product_grad)
            grad_gate = torch.ops.aten.silu_backward(product_grad.mul_(up), gate)
        return grad_gate, grad_up, grad_weight


class GatedExit:
    """Stands in for the method of an MLP that takes gate and up, (..., local_features) each, to its output.

    ``plain`` is that method. It is called while ``keep_product`` is set: where blocks are recomputed, the
    product lives for one block only, and recomputation can end before the row layer's matrix product.
    """

    def __init__(self, layer: RowParallelLinear, plain: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.layer = layer
        self.plain = plain
        self.keep_product = False

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.keep_product:
            return self.plain(gate, up)
        return self.layer.leave(_GatedProduct.apply(*in_compute_dtype(gate, up, self.layer.matrix)))
