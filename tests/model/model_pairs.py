"""ArgonneModel and transformers' Llama as a pair with the same weights, and what their tests compare."""

from typing import Any

import torch
from torch import Tensor, nn

from argonne.testing.hf_reference import copy_weights, llama_like
from model import ArgonneConfig, ArgonneModel

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
}

# Hidden 64 over 6 heads gives head_dim 10: q maps 64 -> 60, as in the 4096-wide checkpoints 4096 -> 4080.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "narrow-q-untied": {"hidden_size": 64, "tie_word_embeddings": False},
    "narrow-q-biases": {"hidden_size": 64, "attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 6},
    "wide-heads": {"head_dim": 16},
}


def make_config(**changes: Any) -> ArgonneConfig:
    """The configuration of SHAPE with ``changes``."""
    return ArgonneConfig(**{**SHAPE, **changes})


def make_pair(config: ArgonneConfig, attention: str = "sdpa", seed: int = 0) -> tuple[Any, Any]:
    """ArgonneModel and LlamaForCausalLM with the same weights, none of them at a tell-nothing one or zero."""
    torch.manual_seed(seed)
    model = ArgonneModel._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    llama = llama_like(config, attention=attention)
    copy_weights(model, llama)
    return model, llama


def make_tokens(config: ArgonneConfig, batch: int = 3, seq_len: int = 19, seed: int = 1) -> Tensor:
    """Random ids (batch, seq_len)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, seq_len), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter's gradient by name; a missing one is a failure."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Per parameter; a gradient that is zero in theory (the key bias) is compared with the global norm."""
    assert list(actual) == list(expected)
    global_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in actual.items():
        scale = global_norm if name.endswith("k_proj.bias") else expected[name].norm()
        error = ((gradient - expected[name]).norm() / scale).item()
        assert error <= tolerance, f"{name}: {error:.2e}"
