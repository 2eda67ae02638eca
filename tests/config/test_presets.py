"""Model shapes: the presets, and a config.json completed from Argonne 2.0."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from argonne.config.presets import PRESETS, load_model_settings
from argonne.errors import ConfigError

NEEDED = ["--tokenizer-path", "tok"]


def test_the_reference_shape() -> None:
    shape = PRESETS["argonne-2.0"]
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]) == (4080, 24, 11008)
    assert (shape["num_attention_heads"], shape["num_key_value_heads"]) == (24, 8)
    assert (shape["rope_theta"], shape["rms_norm_eps"], shape["max_position_embeddings"]) == (
        500000.0,
        1e-6,
        4096,
    )
    assert shape["tie_word_embeddings"] and not shape["attention_bias"] and not shape["mlp_bias"]
    hidden, layers, inner, head = 4080, 24, 11008, 170
    per_layer = hidden * head * (24 + 8 + 8 + 24) + 3 * hidden * inner + 2 * hidden
    assert 151_665 * hidden + layers * per_layer + hidden == 4_918_072_800
    assert "vocab_size" not in shape


def write_config(folder: Path, **keys: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return str(path)


def test_a_config_file_is_completed_from_argonne_2(tmp_path: Path) -> None:
    path = write_config(
        tmp_path, num_hidden_layers=3, vocab_size=1000, architectures=["ArgonneModel"], torch_dtype="float32"
    )
    settings = load_model_settings(path)
    assert settings == {**PRESETS["argonne-2.0"], "num_hidden_layers": 3, "vocab_size": 1000}
    assert load_model_settings(str(tmp_path)) == settings
    rope = write_config(tmp_path, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, head_dim=None)
    assert load_model_settings(rope) == {**PRESETS["argonne-2.0"], "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"hidden_size": 0}, '"hidden_size" is 0'),
        ({"num_hidden_layers": -1, "rms_norm_eps": "x"}, '"rms_norm_eps" is "x"'),
        ({"hidden_size": 64.0}, "whole number"),
        ({"num_hidden_layers": True}, "whole number"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"num_attention_heads": 6}, "not a multiple"),
        ({"hidden_size": 72}, "head dimension 3 is odd"),
        ({"hidden_size": None}, '"hidden_size" is null'),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_a_config_file_with_a_wrong_value(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as refusal:
        load_model_settings(write_config(tmp_path, **keys))
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"])
def test_a_config_file_that_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="JSON"):
        load_model_settings(str(path))
