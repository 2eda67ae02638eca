"""Presets and config.json files: published parameter counts, keys that are used and keys that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import model
from argonne.config import model_keys
from argonne.config.presets import PRESETS, load_model_settings
from argonne.errors import ConfigError
from model import ArgonneConfig, ArgonneModel

PUBLISHED = {
    "argonne-2.0": 4_918_072_800,
    "argonne-2.5": 1_273_807_360,
    "argonne-3.0": 2_882_162_688,
    "argonne-3.5": 2_882_162_688,
    "argonne-4.0": 1_038_492_672,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_parameter_counts(name: str) -> None:
    settings = {"vocab_size": 151_665, **PRESETS[name]}
    with torch.device("meta"):
        built = ArgonneModel(ArgonneConfig(**settings))
    assert sum(parameter.numel() for parameter in built.parameters()) == PUBLISHED[name]


def test_context_and_theta_of_the_presets() -> None:
    told = {
        name: (p["max_position_embeddings"], p["rope_theta"], p["logit_softcap"])
        for name, p in PRESETS.items()
    }
    assert told["argonne-2.0"] == (4096, 500000.0, 0.0)
    assert told["argonne-2.5"] == (1024, 10000.0, 0.0)
    assert told["argonne-3.0"] == (1024, 1e6, 15.0)
    assert told["argonne-3.5"] == (13568, 1e6, 15.0)
    assert told["argonne-4.0"] == (65536, 1e6, 15.0)
    assert all(preset["local_attention_window"] is None for preset in PRESETS.values())


def test_the_models_tables_are_these() -> None:
    assert model.NEUTRAL_SETTINGS == model_keys.NEUTRAL_SETTINGS
    assert model.SILENT_SETTINGS == model_keys.SILENT_SETTINGS


def written(folder: Path, **document: Any) -> str:
    path = folder / "config.json"
    path.write_text(
        json.dumps({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **document})
    )
    return str(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("attn_logit_softcapping", 50.0),
        ("mtp_horizon", 2),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("num_experts", 8),
        ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}),
        ("qk_norms", True),
    ],
)
def test_a_key_that_would_make_another_model_is_refused_by_name(
    tmp_path: Path, key: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=key):
        load_model_settings(written(tmp_path, **{key: value}))


def test_neutral_values_and_keys_that_say_nothing_are_accepted(tmp_path: Path) -> None:
    settings = load_model_settings(
        written(
            tmp_path, sliding_window=None, mtp_horizon=1, attention_dropout=0.0,
            hidden_act="silu", use_cache=False, initializer_range=0.02, layer_types=["full_attention"],
            torch_dtype="bfloat16", _name_or_path="x",
            rope_parameters={"rope_type": "default", "rope_theta": 123.0}, transformers_version="5.0",
        )
    )  # fmt: skip
    assert settings["rope_theta"] == 123.0 and set(settings) >= {"qk_norm", "logit_softcap"}


def test_the_familys_switches_are_used(tmp_path: Path) -> None:
    switches = {
        "qk_norm": True,
        "v_norm": True,
        "sandwich_norm": True,
        "logit_softcap": 15.0,
        "z_loss_weight": 1e-4,
    }
    local = {"interleaved_local_attention": True, "local_attention_window": 512}
    settings = load_model_settings(written(tmp_path, **switches, **local))
    assert {key: settings[key] for key in (*switches, *local)} == {**switches, **local}
    with pytest.raises(ConfigError, match="local_attention_window"):
        load_model_settings(written(tmp_path, interleaved_local_attention=True))


@pytest.mark.parametrize(
    ("document", "implied"),
    [
        ({"model_type": "llama", "attention_bias": False}, {}),
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072},
            {"attention_bias": True},
        ),
        ({"model_type": "qwen3", "head_dim": 32}, {"qk_norm": True, "head_dim": 32}),
        ({"model_type": "mistral", "sliding_window": None}, {}),
    ],
)
def test_other_families_that_this_architecture_expresses(
    tmp_path: Path, document: dict[str, Any], implied: dict[str, Any]
) -> None:
    settings = load_model_settings(written(tmp_path, **document))
    assert {key: settings[key] for key in implied} == implied
    with pytest.raises(ConfigError, match="gemma2"):
        load_model_settings(written(tmp_path, model_type="gemma2"))
