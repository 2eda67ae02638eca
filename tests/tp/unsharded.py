"""Loss, gradients and logits of the small unsharded model, which its split is compared with."""

from typing import Any

import torch
from torch import Tensor

from argonne.testing.models import loss_of, small_model

Grads = dict[str, Tensor]


def reference(dtype: torch.dtype, tokens: Tensor, **changes: Any) -> tuple[float, Grads, Tensor]:
    """Loss, gradients and logits of the unsharded model."""
    model = small_model(dtype, **changes)
    loss = loss_of(model, tokens)
    loss.backward()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    return (
        float(loss.detach()),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        logits,
    )


def norm_of_all(gradients: Grads) -> float:
    """The norm of all gradients, beside which a gradient that is zero in theory is measured."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
