"""Names of weights: this model's, and those of Llama, Mistral, Qwen2 and Qwen3 in transformers."""

from __future__ import annotations

import re

from argonne.checkpoint.reader import strip_wrappers

_PAIRS = (
    (r"model\.(embed_tokens|norm)\.", r"(embed_tokens|norm)\."),
    (r"model\.layers\.(\d+)\.self_attn\.", r"blocks\.(\d+)\.attn\."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"blocks\.(\d+)\.input_norm\."),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.", r"blocks\.(\d+)\.post_norm\."),
    (r"model\.layers\.(\d+)\.mlp\.", r"blocks\.(\d+)\.mlp\."),
)
"""Beginnings of the same names in Llama and in ArgonneModel; the group stays."""


def argonne_name(name: str) -> str:
    """The name in ArgonneModel of a weight of Argonne or of a Llama-like model (with or without a head)."""
    name = strip_wrappers(name)
    for llama, argonne in _PAIRS:
        optional = llama.replace(r"model\.", r"^(?:model\.)?", 1)
        name = re.sub(optional, _filled(argonne), name)
    return name


def llama_name(name: str) -> str:
    """The name in LlamaForCausalLM of a weight of ArgonneModel."""
    for llama, argonne in _PAIRS:
        name = re.sub("^" + argonne, _filled(llama), name)
    return name


def _filled(pattern: str) -> str:
    return re.sub(r"\([^)]*\)", r"\\1", pattern).replace(r"\.", ".")
