"""Whether values are finite: what is saved, converted, exported or loaded holds no NaN and no infinity."""

from __future__ import annotations

import math

import torch

from argonne.errors import CheckpointError


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; reads the tensor once and allocates nothing of its size."""
    # NaN propagates through aminmax, and an infinity is one of the bounds
    return not values.numel() or all(math.isfinite(float(bound)) for bound in torch.aminmax(values))


def require_finite(values: torch.Tensor, label: str) -> None:
    """CheckpointError naming the tensor where a value is NaN or infinite."""
    if not all_finite(values):
        raise CheckpointError(f"{label} holds NaN or infinite values, which are never saved")
