"""Tiny models of transformers, their unsharded loss, and the comparison of gradients with theirs."""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
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

from argonne.verification.compare import difference

VOCAB = 131


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.15,  # attention far from uniform: its gradients are not lost in the others
}
"""131 ids and 90 features divide by nothing; 2 key/value heads are shared over 4 ranks."""


KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model in float32; norms and biases are random too, so that each gradient counts."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**COMMON, sliding_window=4, head_dim=10))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=10, tie_word_embeddings=True))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=8, n_positions=64, bos_token_id=None,
                eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def _wide_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def widen(model: PreTrainedModel) -> PreTrainedModel:
    """In float64 throughout: transformers' norms round to float32."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_wide_norm, module)
    return model


def unsharded_loss(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Next-token loss by torch's own cross entropy, in the precision of the logits."""
    logits = model(input_ids=ids, use_cache=False, **options).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def check_gradients(gradients: dict[str, Tensor], reference: nn.Module, tolerance: float = 1e-10) -> None:
    """Each parameter's gradient by its own norm, or by the global one where it is zero in theory."""
    expected = gradients_of(reference)
    assert gradients.keys() == expected.keys()
    total = torch.cat([grad.double().flatten() for grad in expected.values()]).norm().item()
    for name, grad in expected.items():
        assert difference(name, gradients[name], grad, total).relative < tolerance, name


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
