"""Small folders of weights, as transformers itself writes them, and the logits that it computes from them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rms_norm_eps": 1e-5}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
}


def foreign_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of transformers with random weights, biases and norms too."""
    config_class, model_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config_class(**{**SIZES, **own, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_folder(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """Write it as transformers does; the model's own parameters are rounded alike, in float32."""
    rounded: Any = copy.deepcopy(model)
    rounded.to(dtype).save_pretrained(folder, **how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return folder


def tokens() -> Tensor:
    return torch.randint(0, 131, (2, 20), generator=torch.Generator().manual_seed(3))
