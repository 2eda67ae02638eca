"""The matrix products of the layers, on the CPU through oneDNN where torch's own are slower.

Torch hands float32 products to MKL, which uses AVX-512 on Intel's processors only; on AMD's the oneDNN that
every torch carries is twice as fast (200 against 90 GFLOP/s on one core of an EPYC). Both are float32
throughout. Everything else (GPUs, other dtypes, compiled graphs, small products) is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST_FLOPS = 1 << 22
"""Below this a product takes so few microseconds that setting it up counts."""


def _by_onednn(left: Tensor, right: Tensor, flops: int) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and flops >= LEAST_FLOPS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (..., k) times right (n, k) transposed, plus bias (n,); views of any strides."""
    rows = left if left.dim() == 2 else left.reshape(-1, left.shape[-1])
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, right, bias, "none", [], "")
    if left.dim() == 2:
        return result
    # Not a view to autograd: what comes next may overwrite it.
    return torch.ops.aten._unsafe_view(result, (*left.shape[:-1], right.shape[0]))


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without a gradient: (..., in_features) and (out_features, in_features)."""
    if _by_onednn(x, weight, 2 * x.numel() * weight.shape[0]):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for matrices, without a gradient."""
    if _by_onednn(left, right, 2 * left.numel() * right.shape[1]):
        return _onednn(left, right.t())
    return left @ right


def add_matrix_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right for matrices, without a gradient; ``total`` may be overwritten."""
    if _by_onednn(left, right, 2 * left.numel() * right.shape[1]):
        return total.add_(_onednn(left, right.t()))
    return torch.addmm(total, left, right)


class _Linear(torch.autograd.Function):
    """x W^T + b by oneDNN, whose op has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needs = ctx.needs_input_grad
        grad_x = matrix_product(rows, weight).view(*grad.shape[:-1], -1) if needs[0] else None
        grad_weight = matrix_product(rows.t(), x.reshape(-1, x.shape[-1])) if needs[1] else None
        return grad_x, grad_weight, rows.sum(0) if needs[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by oneDNN where that pays."""
    if _by_onednn(x, weight, 2 * x.numel() * weight.shape[0]):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return F.linear(x, weight, bias)
