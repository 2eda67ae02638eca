"""A step of a GPU's rank on tensors without memory: the code of CUDA, on the CPU.

Fake tensors of the CPU stand for those of a GPU: torch's backward pass on fake CUDA tensors wants a real
device. What differs there is replaced while `cuda_code` is on: the kernels of the fused norm and of flash
attention, and the making of memory for a model's parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model as decoder

Note = Callable[[str, int], None]
"""Takes the name of a kernel and the bytes that it reads and writes."""


def nbytes(*tensors: Tensor) -> int:
    """Of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Flash(torch.autograd.Function):
    """Flash attention: outputs and gradients in the layout of the inputs, as its kernels give them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, groups: int, scaling: float
) -> Tensor:
    """As ``model.sdpa_attention`` on CUDA: heads are padded to a multiple of 8 for the call, then cut."""
    missing = -query.shape[-1] % 8
    if not missing:
        output: Tensor = _Flash.apply(query, key, value)
        return output
    padded: Tensor = _Flash.apply(*(F.pad(tensor, (0, missing)) for tensor in (query, key, value)))
    return padded[..., : query.shape[-1]]


def fake_norms(note: Note) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Stand-ins for ``model.fused_norm`` and its backward. The backward runs two kernels, one for each
    gradient, and both read x and the gradient."""

    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
        note("fused_rms_norm", 2 * nbytes(x) + nbytes(rstd, weight))
        return torch.empty_like(x), rstd

    def backward(
        grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, needs: list[bool]
    ) -> tuple[Tensor, Tensor]:
        reads = sum(needs) * nbytes(grad, x, rstd)
        note("fused_rms_norm_backward", reads + nbytes(x) + 2 * nbytes(weight))
        return torch.empty_like(x), torch.empty_like(weight)

    return forward, backward


def to_empty(module: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
    """New memory for each parameter, a shared one once: torch's own cannot swap fake tensors."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]
    return module


@contextlib.contextmanager
def cuda_code(note: Note) -> Iterator[None]:
    """The model's code for CUDA, its norms' bytes told to ``note``; attention's are not counted."""
    forward, backward = fake_norms(note)
    stand_ins = [
        (decoder, "saves_traffic", lambda x: x.dtype != torch.float64),
        (decoder, "fused_norm", forward),
        (decoder, "fused_norm_backward", backward),
        (decoder, "sdpa_attention", flash_attention),
        (decoder.ArgonneModel, "to_empty", to_empty),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in stand_ins]
    try:
        for owner, name, stand_in in stand_ins:
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
