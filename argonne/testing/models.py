"""Small Argonne models and batches that several tests share."""

from typing import Any

import torch
from torch import Tensor

from model import ArgonneConfig, ArgonneModel

SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "intermediate_size": 90,
    "max_position_embeddings": 64,
}
"""Nothing divides evenly: 131 ids, 8 heads of 6 on a width of 50, 90 features over 4 ranks."""


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> ArgonneModel:
    """A small model with random weights; biases and norms too are random, so that each gradient counts."""
    torch.manual_seed(seed)
    model = ArgonneModel(ArgonneConfig(**{**SMALL, **changes}))
    model.to(dtype=dtype)  # type: ignore[call-arg]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def random_tokens(vocab_size: int = 131, batch: int = 2, length: int = 14, seed: int = 1) -> Tensor:
    """(batch, length) ids."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """The training loop's loss: inputs are all but the last token, targets all but the first."""
    output = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
    loss: Tensor = output.loss
    return loss


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; 0 for 0 / 0, a gradient that is zero in theory."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
