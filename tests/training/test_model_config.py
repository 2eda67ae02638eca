"""The configuration of a checkpoint's model: its own or its tensors', and what --model-config may say."""

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.config.presets import PRESETS
from argonne.errors import CheckpointError, ConfigError
from argonne.testing.models import SMALL
from argonne.training.model_config import explicit_keys, local_attention_line, resolve_model_config

OWN: dict[str, Any] = {**PRESETS["argonne-2.0"], **SMALL}


class Reader:
    """A checkpoint of the small model as far as shapes and metadata go."""

    path = Path("c.pth")
    tied = False

    def __init__(self, own: dict[str, Any] | None, *more: str) -> None:
        self.metadata = {} if own is None else {"model_config": own}
        self._shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (131, 50), "norm.weight": (50,)}
        for layer in range(2):
            for name, shape in self._of_a_layer(more):
                self._shapes[f"blocks.{layer}.{name}"] = shape
        self._shapes["lm_head.weight"] = (131, 50)
        self.model = self.names = tuple(self._shapes)

    @staticmethod
    def _of_a_layer(more: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
        shapes: list[tuple[str, tuple[int, ...]]] = [
            ("attn.q_proj.weight", (48, 50)),
            ("attn.k_proj.weight", (24, 50)),
            ("attn.v_proj.weight", (24, 50)),
            ("attn.o_proj.weight", (50, 48)),
            ("mlp.gate_proj.weight", (90, 50)),
            ("mlp.up_proj.weight", (90, 50)),
            ("mlp.down_proj.weight", (50, 90)),
            ("input_norm.weight", (50,)),
            ("post_norm.weight", (50,)),
        ]
        return shapes + [(name, (6,)) for name in more]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]


def resolved(reader: Reader, name: str | None = None, **more: Any) -> dict[str, Any]:
    return resolve_model_config(reader, name, **more)  # type: ignore[arg-type]


def written(folder: Path, **document: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_without_the_flag_it_is_the_checkpoints_own() -> None:
    found = resolved(Reader({**OWN, "rope_theta": 777.0, "rms_norm_eps": 1e-3}))
    assert {key: found[key] for key in SMALL} == SMALL
    assert (found["rope_theta"], found["rms_norm_eps"]) == (777.0, 1e-3)


def test_a_rotary_base_told_in_another_place_counts() -> None:
    own = {key: value for key, value in OWN.items() if key != "rope_theta"}
    found = resolved(Reader({**own, "rope_parameters": {"rope_type": "default", "rope_theta": 555.0}}))
    assert found["rope_theta"] == 555.0


def test_without_its_own_it_is_the_tensors_with_the_heads_of_the_flag(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    found = resolved(Reader(None), written(tmp_path, **heads, rope_theta=33.0))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    assert {key: found[key] for key in sizes} == {key: SMALL[key] for key in sizes}
    assert (found["num_attention_heads"], found["rope_theta"]) == (8, 33.0)


def test_norms_on_heads_alone_do_not_say_the_rest() -> None:
    normed = ("attn.q_norm.weight", "attn.k_norm.weight")
    with pytest.raises(CheckpointError, match=r"c\.pth has norms on its heads .*: give --model-config"):
        resolved(Reader(None, *normed))
    assert resolved(Reader({**OWN, "qk_norm": True}, *normed))["qk_norm"]


def test_what_the_flag_states_must_be_the_checkpoints(tmp_path: Path) -> None:
    reader = Reader(OWN)
    given = written(tmp_path, hidden_size=50, num_hidden_layers=3)
    said = r"num_hidden_layers is 2 in the checkpoint and 3 in --model-config"
    with pytest.raises(CheckpointError, match=said) as caught:
        resolved(reader, given)
    assert "hidden_size" not in str(caught.value)
    assert resolved(reader, given, ignored={"num_hidden_layers"})["num_hidden_layers"] == 2
    # What the file leaves out is Argonne 2.0's and was never asked for.
    assert resolved(reader, written(tmp_path, hidden_size=50))["intermediate_size"] == 90


def test_a_preset_is_compared_whole_with_an_own_configuration() -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size is 50 in the checkpoint and 128 in --model-conf"):
        resolved(Reader(OWN), "argonne-tiny")
    with pytest.raises(ConfigError, match=r"--model-config argonne-9 is neither a preset nor a file"):
        resolved(Reader(OWN), "argonne-9")


def test_what_a_file_states_itself(tmp_path: Path) -> None:
    path = Path(written(tmp_path, hidden_size=50, architectures=["ArgonneModel"]))
    settings = {"hidden_size": 50, "rope_theta": 10000.0}
    assert explicit_keys(str(path), settings) == {"hidden_size"}
    assert explicit_keys(str(tmp_path), settings) == {"hidden_size"}  # the folder it lies in
    assert explicit_keys("argonne-tiny", settings) == set(settings)


def test_layers_that_attend_locally_are_numbered() -> None:
    settings = {"num_hidden_layers": 5, "local_attention_window": 7}
    assert local_attention_line(settings) is None
    assert local_attention_line({**settings, "interleaved_local_attention": False}) is None
    line = local_attention_line({**settings, "interleaved_local_attention": True})
    assert line is not None and line.startswith("Local attention in layers 1, 3 of 5: 7 tokens back")
    assert "(--local-attention off turns it off)" in line and "\n" not in line
