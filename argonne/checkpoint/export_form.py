"""What an export is written as: an Argonne folder with its code, or a plain Llama folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from argonne.checkpoint.family_names import llama_name
from argonne.errors import ConfigError

FORMS = ("argonne", "llama")
MODULE = "modeling_argonne"
_NOT_IN_LLAMA = ("qk_norm", "v_norm", "sandwich_norm", "logit_softcap", "interleaved_local_attention")
_SAME_IN_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)
SHOWN_KEYS = (*_SAME_IN_LLAMA, "rope_theta", *_NOT_IN_LLAMA, "local_attention_window", "z_loss_weight")
"""Of a configuration, what a model card shows."""
_NOT_ARGUMENTS = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "model_type")


def config_arguments(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a stored configuration that ``ArgonneConfig`` takes."""
    return {
        key: value
        for key, value in model_config.items()
        if key not in _NOT_ARGUMENTS and not key.startswith("_")
    }


def check_form(form: str, model_config: Mapping[str, Any]) -> None:
    """ConfigError where a Llama cannot express the model, naming the switch."""
    if form == "argonne":
        return
    from model import ArgonneConfig

    config = ArgonneConfig(**config_arguments(model_config))
    switches = [f"{name} {getattr(config, name)}" for name in _NOT_IN_LLAMA if getattr(config, name)]
    if config.hidden_size % config.num_attention_heads:
        heads = config.num_attention_heads
        switches.append(
            f"hidden_size {config.hidden_size} that its {heads} num_attention_heads do not divide"
        )
    if switches:
        raise ConfigError(
            f"--as llama: a Llama has no {', no '.join(switches)}: leave --as out, which exports as argonne"
        )


def weight_name(form: str, name: str) -> str:
    """The name of a weight in the folder."""
    return llama_name(name) if form == "llama" else name


def config_document(
    form: str, model_config: Mapping[str, Any], dtype: torch.dtype, ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json; ``ids`` are the tokenizer's ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""
    from model import ArgonneConfig

    config = ArgonneConfig(**{**config_arguments(model_config), **ids})
    dtype_name = str(dtype).removeprefix("torch.")
    if form == "llama":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(config, key) for key in _SAME_IN_LLAMA},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "use_cache": True,
            **ids,
            "dtype": dtype_name,
            "torch_dtype": dtype_name,  # what transformers before 5 reads
        }
    written: dict[str, Any] = config.to_dict()
    written["architectures"] = ["ArgonneModel"]
    written["dtype"] = dtype_name
    written["auto_map"] = {
        "AutoConfig": f"{MODULE}.ArgonneConfig",
        "AutoModel": f"{MODULE}.ArgonneModel",
        "AutoModelForCausalLM": f"{MODULE}.ArgonneModel",
    }
    return written
