"""Names of weights in Llama-like models and here, both ways."""

import pytest

from argonne.checkpoint.family_names import argonne_name, llama_name

PAIRS = [
    ("model.embed_tokens.weight", "embed_tokens.weight"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("model.layers.0.self_attn.q_proj.weight", "blocks.0.attn.q_proj.weight"),
    ("model.layers.17.self_attn.k_proj.bias", "blocks.17.attn.k_proj.bias"),
    ("model.layers.3.self_attn.q_norm.weight", "blocks.3.attn.q_norm.weight"),
    ("model.layers.9.input_layernorm.weight", "blocks.9.input_norm.weight"),
    ("model.layers.9.post_attention_layernorm.weight", "blocks.9.post_norm.weight"),
    ("model.layers.10.mlp.down_proj.weight", "blocks.10.mlp.down_proj.weight"),
]


@pytest.mark.parametrize(("llama", "argonne"), PAIRS)
def test_there_and_back(llama: str, argonne: str) -> None:
    assert llama_name(argonne) == llama
    assert argonne_name(llama) == argonne
    assert argonne_name(argonne) == argonne
    assert argonne_name(llama.removeprefix("model.")) == argonne  # a model without a head


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_wrappers_are_taken_off(wrapper: str) -> None:
    assert argonne_name(f"{wrapper}model.layers.2.mlp.up_proj.weight") == "blocks.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "name", ["other.layers.2.mlp.up_proj.weight", "layersX.2.mlp.w", "rotary.norm.weight"]
)
def test_other_names_stay(name: str) -> None:
    assert argonne_name(name) == name and llama_name(name) == name
