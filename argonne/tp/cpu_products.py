"""The matrix products of the layers: torch's own, or on the CPU those of the oneDNN that torch carries.

Torch hands float32 products to MKL, which uses AVX-512 on Intel's processors only and is the faster one
there, most of all in weight gradients. On others oneDNN can be faster, by a factor that differs from machine
to machine. Both compute in float32 throughout. GPUs, Intel's processors, other dtypes, compiled graphs and
small products use torch's own. Nothing is timed to decide: a run and its resume must take the same products.

Torch has no public name for a product by oneDNN. `_onednn` alone calls the private op; where a torch lacks it
or it refuses, torch's own products take its place. Which it is, is decided once, at the first product.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST_FLOPS = 1 << 22
"""Below this, oneDNN's set-up costs more than its product saves."""


def _onednn(rows: Tensor, right: Tensor, bias: Tensor | None) -> Tensor | None:
    """rows (m, k) times right (n, k) transposed, plus bias (n,); None where the op is missing or refuses."""
    try:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, right, bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return result


@functools.cache
def mkl_is_faster(processors: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether torch's own products are MKL's on a processor of Intel's."""
    try:
        return torch.backends.mkl.is_available() and "GenuineIntel" in processors.read_text(encoding="utf-8")
    except OSError:  # another system than Linux
        return False


@functools.cache
def onednn_works() -> bool:
    """Whether oneDNN's op is there and gives torch's own products, for the strides that layers use."""

    def agrees() -> bool:
        rows = torch.arange(12, dtype=torch.float32, device="cpu").view(3, 4)
        right = torch.arange(20, dtype=torch.float32, device="cpu").view(5, 4) - 7.0
        cases = [
            (rows, right, None),
            (rows, right, right[:, 0].contiguous()),
            (rows.t().contiguous().t(), right.t().contiguous().t(), None),
        ]
        products = [(_onednn(*case), F.linear(*case)) for case in cases]
        return all(ours is not None and torch.allclose(ours, torchs) for ours, torchs in products)

    # In a thread of its own, where no dispatch mode is on: selective recomputation would take the products
    # that it sees here for a block's.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(agrees).result()


def onednn_is_used() -> bool:
    """Whether large float32 products on this CPU are oneDNN's."""
    return (
        not mkl_is_faster()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and onednn_works()
    )


def _by_onednn(left: Tensor, right: Tensor, flops: int) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and flops >= LEAST_FLOPS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_used()
    )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (..., k) times right (n, k) transposed, plus bias (n,); views of any strides."""
    rows = left if left.dim() == 2 else left.reshape(-1, left.shape[-1])
    result = _onednn(rows, right, bias)
    if result is None:  # these operands alone are refused
        result = F.linear(rows, right, bias)
    if left.dim() == 2:
        return result
    # Not a view to autograd: what comes next may overwrite it.
    return torch.ops.aten._unsafe_view(result, (*left.shape[:-1], right.shape[0]))


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b without a gradient: (..., in_features) and (out_features, in_features)."""
    if _by_onednn(x, weight, 2 * x.numel() * weight.shape[0]):
        return _product(x, weight, bias)
    return F.linear(x, weight, bias)


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right for matrices, without a gradient."""
    if _by_onednn(left, right, 2 * left.numel() * right.shape[1]):
        return _product(left, right.t())
    return left @ right


def add_matrix_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right for matrices, without a gradient; ``total`` may be overwritten."""
    if _by_onednn(left, right, 2 * left.numel() * right.shape[1]):
        return total.add_(_product(left, right.t()))
    return torch.addmm(total, left, right)


class _Linear(torch.autograd.Function):
    """x W^T + b by oneDNN, whose op has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

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
