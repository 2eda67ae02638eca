"""Number formats: the dtypes that a flag may name, and what autocast asks for."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def can_be_read(tensor: Tensor) -> bool:
    """Whether asking for a value costs no waiting: on the CPU, in eager code, and not of a fake tensor."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return tensor.device.type == "cpu" and plain and not torch.compiler.is_compiling()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on the tensor's device; None outside autocast and for float64."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def in_compute_dtype(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands as autocast would hand them to a matrix product (casts are outside our Functions)."""
    dtype = autocast_dtype(first)
    if dtype is None:
        return (first, *others)
    return tuple(None if operand is None else operand.to(dtype) for operand in (first, *others))
