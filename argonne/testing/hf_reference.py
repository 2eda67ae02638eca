"""Transformers' Llama as the reference for Argonne: same shape, same weights, other code."""

import re

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from model import ArgonneConfig

_MODULE_NAMES = (
    (r"^(embed_tokens|norm)\.", r"model.\1."),
    (r"^blocks\.(\d+)\.attn\.", r"model.layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.input_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blocks\.(\d+)\.post_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blocks\.(\d+)\.mlp\.", r"model.layers.\1.mlp."),
)


def llama_name(argonne_name: str) -> str:
    """The name in LlamaForCausalLM of an ArgonneModel parameter."""
    for pattern, replacement in _MODULE_NAMES:
        argonne_name = re.sub(pattern, replacement, argonne_name)
    return argonne_name


def llama_like(config: ArgonneConfig, *, attention: str = "sdpa") -> LlamaForCausalLM:
    """An untrained LlamaForCausalLM of the same shape.

    LlamaConfig refuses a hidden size that the heads do not divide, so the head counts are set afterwards.
    """
    llama_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama_config.num_attention_heads = config.num_attention_heads
    llama_config.num_key_value_heads = config.num_key_value_heads
    return LlamaForCausalLM._from_config(llama_config, attn_implementation=attention)


def copy_weights(model: nn.Module, llama: LlamaForCausalLM) -> None:
    """Give Llama the weights of an ArgonneModel; every name and shape must be matched."""
    llama.load_state_dict({llama_name(name): tensor for name, tensor in model.state_dict().items()})


def llama_parameters(model: nn.Module, llama: LlamaForCausalLM) -> dict[str, Tensor]:
    """Llama's parameters under the names and in the order of ``model.named_parameters()``."""
    return {name: llama.get_parameter(llama_name(name)) for name, _ in model.named_parameters()}


def llama_gradients(model: nn.Module, llama: LlamaForCausalLM) -> dict[str, Tensor]:
    """Llama's gradients under the names and in the order of ``model.named_parameters()``."""
    gradients = {}
    for name, parameter in llama_parameters(model, llama).items():
        assert parameter.grad is not None, f"Llama has no gradient for {name}"
        gradients[name] = parameter.grad
    return gradients


class _WideRMSNorm(nn.Module):
    """torch's own RMSNorm: transformers' rounds float64 to float32."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def _wide_loss(logits: Tensor, labels: Tensor, **kwargs: object) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def widen(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """Llama in float64 throughout (transformers rounds norms and loss to float32)."""
    llama.double()
    for name, module in list(llama.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            parent, _, leaf = name.rpartition(".")
            setattr(llama.get_submodule(parent), leaf, _WideRMSNorm(module))
    llama.loss_function = _wide_loss
    return llama
