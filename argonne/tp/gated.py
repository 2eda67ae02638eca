"""The gated exit of an MLP, silu(gate) * up and the row layer behind it, without keeping their product.

A row layer keeps its input for the gradient of its weight. Behind a gate that input can be made again from
gate and up, which are kept anyway, in one pass over memory. Of the 4 I elements a token that a SwiGLU spelled
out keeps (gate, silu(gate), up and their product) 2 I remain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from argonne.tp.layers import RowParallelLinear, in_compute_dtype
from argonne.tp.products import matrix_product, times_transposed


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
