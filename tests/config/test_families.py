"""The config.json of other families: what their absent keys mean, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.config.families import FAMILY_DEFAULTS, read_folder_config, with_family_defaults
from argonne.errors import ConfigError

SMALL = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def read(folder: Path, **document: Any) -> tuple[dict[str, Any], str]:
    (folder / "config.json").write_text(json.dumps(document))
    return read_folder_config(folder, "--init-from")


@pytest.mark.parametrize(
    ("family", "key_value_heads"), [("llama", 4), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)]
)
def test_absent_keys_are_the_familys(family: str, key_value_heads: int) -> None:
    found = with_family_defaults({"model_type": family, **SMALL})
    assert {key: found[key] for key in SMALL} == SMALL
    # Llama alone takes as many as query heads; the others have a number of their own in transformers.
    assert (found["num_key_value_heads"], found["rope_theta"]) == (key_value_heads, 10000.0)
    assert found["rms_norm_eps"] == 1e-6 and found["tie_word_embeddings"] is False


def test_a_null_is_as_absent_but_for_the_window_that_it_turns_off() -> None:
    document = {
        "model_type": "mistral",
        "num_key_value_heads": None,
        "sliding_window": None,
        "rope_theta": 5.0,
    }
    found = with_family_defaults(document)
    assert (found["num_key_value_heads"], found["sliding_window"], found["rope_theta"]) == (8, None, 5.0)
    assert with_family_defaults({"model_type": "mistral"})["sliding_window"] == 4096


def test_a_rotary_base_in_rope_parameters_stands_alone() -> None:
    rope = {"rope_type": "default", "rope_theta": 7.0}
    assert "rope_theta" not in with_family_defaults({"model_type": "llama", "rope_parameters": rope})
    without = with_family_defaults({"model_type": "llama", "rope_parameters": {"rope_type": "default"}})
    assert without["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "document", [{}, {"model_type": "argonne2", "hidden_size": 5}, {"model_type": "gpt2"}]
)
def test_other_documents_stay_as_they_are(document: dict[str, Any]) -> None:
    found = with_family_defaults(document)
    assert found == document and found is not document


def test_the_defaults_are_not_changed_by_what_is_read() -> None:
    before = json.dumps(FAMILY_DEFAULTS)
    with_family_defaults({"model_type": "qwen3", **SMALL})["vocab_size"] = 1
    assert json.dumps(FAMILY_DEFAULTS) == before


def test_a_folder_gives_its_settings_and_its_family(tmp_path: Path) -> None:
    settings, family = read(tmp_path, model_type="llama", rope_parameters={"rope_theta": 7.0}, **SMALL)
    assert family == "llama" and {key: settings[key] for key in SMALL} == SMALL
    assert (settings["rope_theta"], settings["num_key_value_heads"]) == (7.0, 4)
    assert read(tmp_path, **SMALL, num_key_value_heads=2)[1] == "argonne2"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"model_type": "gpt2"}, r'"model_type" is "gpt2"'),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
            r'"rope_scaling" asks for',
        ),
        ({"model_type": "llama", "hidden_size": "wide"}, r"hidden_size"),
    ],
)
def test_what_this_architecture_does_not_express_is_named(
    document: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, **{**SMALL, **document})
    assert str(caught.value).startswith(f"--init-from {tmp_path}/config.json") and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize(("text", "said"), [("{", "is not valid JSON"), ("[]", "holds no JSON object")])
def test_a_file_that_is_no_configuration(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_folder_config(tmp_path, "--init-from")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"--init-from .* cannot be read \(No such file"):
        read_folder_config(tmp_path, "--init-from")
