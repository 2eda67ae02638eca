"""What an export is written as: its config.json, the names of its weights, what a Llama cannot say."""

from typing import Any

import pytest
import torch

from argonne.checkpoint.export_form import check_form, config_arguments, config_document, weight_name
from argonne.config.presets import PRESETS
from argonne.errors import ConfigError
from argonne.testing.models import SMALL

CONFIG: dict[str, Any] = {
    **PRESETS["argonne-2.0"],
    **SMALL,
    "hidden_size": 48,
    "model_type": "argonne2",
    "tie_word_embeddings": True,
    "rope_theta": 777.0,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def test_what_is_no_argument_of_the_configuration_is_left_out() -> None:
    stored = {"vocab_size": 5, "model_type": "argonne2", "_name_or_path": "x", "torch_dtype": "float32"}
    assert config_arguments({**stored, "auto_map": {}, "transformers_version": "5"}) == {"vocab_size": 5}


def test_a_llama_has_the_same_sizes_and_is_read_by_transformers() -> None:
    from transformers import LlamaConfig

    document = config_document("llama", CONFIG, torch.bfloat16, IDS)
    read = LlamaConfig.from_dict(document)
    for key in (*SMALL, "tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps"):
        assert getattr(read, key) == CONFIG[key], key
    rope: Any = getattr(read, "rope_parameters", None)  # transformers 5; before, an attribute
    theta = rope["rope_theta"] if rope else read.rope_theta
    assert theta == 777.0 and (read.bos_token_id, read.eos_token_id) == (1, 2)
    assert document["torch_dtype"] == document["dtype"] == "bfloat16"
    assert document["architectures"] == ["LlamaForCausalLM"]


def test_an_argonne_folder_names_its_code() -> None:
    document = config_document("argonne", CONFIG, torch.float16, IDS)
    assert document["auto_map"]["AutoModelForCausalLM"] == "modeling_argonne.ArgonneModel"
    assert (document["architectures"], document["dtype"]) == (["ArgonneModel"], "float16")
    assert (document["hidden_size"], document["eos_token_id"]) == (48, 2)


def test_names_of_weights_follow_the_form() -> None:
    assert weight_name("argonne", "blocks.1.attn.q_proj.weight") == "blocks.1.attn.q_proj.weight"
    assert weight_name("llama", "blocks.1.attn.q_proj.weight") == "model.layers.1.self_attn.q_proj.weight"


def test_a_plain_model_takes_both_forms() -> None:
    check_form("argonne", CONFIG)
    check_form("llama", CONFIG)
    check_form("llama", {**CONFIG, "z_loss_weight": 0.1})  # no part of the forward pass


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"qk_norm": True}, "a Llama has no qk_norm True: leave --as out"),
        ({"logit_softcap": 15.0, "v_norm": True}, "a Llama has no v_norm True, no logit_softcap 15.0: leave"),
        ({"hidden_size": 50}, "hidden_size 50 that its 8 num_attention_heads do not divide"),
        (
            {"interleaved_local_attention": True, "local_attention_window": 7},
            "no interleaved_local_attention True",
        ),
    ],
)
def test_what_a_llama_cannot_express_is_named(switches: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_form("llama", {**CONFIG, **switches})
    assert said in str(caught.value) and str(caught.value).startswith("--as llama: ")
    check_form("argonne", {**CONFIG, **switches})
