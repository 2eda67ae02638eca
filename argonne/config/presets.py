"""``--model-config``: the preset shapes, and a ``config.json`` completed from Argonne 2.0.

Standard library only: a wrong shape is refused before torch is imported.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from argonne.config.model_keys import foreign_keys
from argonne.errors import CheckpointError, ConfigError

REFERENCE = "argonne-2.0"

_COMMON: dict[str, Any] = {
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "v_norm": False,
    "sandwich_norm": False,
    "logit_softcap": 0.0,
    "interleaved_local_attention": False,
    "local_attention_window": None,
    "z_loss_weight": 0.0,
    "tie_word_embeddings": True,
}
_ALL_NORMS = {"qk_norm": True, "v_norm": True, "sandwich_norm": True, "logit_softcap": 15.0}
_RELEASED = {"vocab_size": 151669, "rope_theta": 1e6, "max_position_embeddings": 1024}
"""Of 2.5 and later, whose published parameter counts contain this vocabulary."""


def _shape(
    hidden: int, layers: int, heads: int, key_value_heads: int, intermediate: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate,
        **_COMMON,
        **more,
    }


_ARGONNE_3 = _shape(3072, 24, 12, 4, 8192, head_dim=256, **_RELEASED, **_ALL_NORMS)

PRESETS: dict[str, dict[str, Any]] = {
    "argonne-tiny": _shape(128, 4, 8, 4, 352),
    "argonne-tiny-4": _shape(128, 4, 8, 4, 352, rope_theta=1e6, **_ALL_NORMS),
    "argonne-small": _shape(1024, 16, 16, 8, 2816),
    "argonne-medium": _shape(2048, 20, 16, 8, 5632),
    REFERENCE: _shape(4080, 24, 24, 8, 11008),
    "argonne-2.5": _shape(1792, 28, 14, 7, 4864, head_dim=128, **{**_RELEASED, "rope_theta": 10000.0}),
    "argonne-3.0": _ARGONNE_3,
    "argonne-3.5": {**_ARGONNE_3, "max_position_embeddings": 13568},
    "argonne-4.0": _shape(
        1536, 32, 6, 2, 4096, head_dim=256, **{**_RELEASED, "max_position_embeddings": 65536}, **_ALL_NORMS
    ),
}
"""Keyword arguments of ``ArgonneConfig``; where ``vocab_size`` is not among them, the tokenizer gives it."""

MODEL_KEYS = frozenset({*_COMMON, *PRESETS["argonne-4.0"]})
"""All that the shape of a model is made of."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "local_attention_window",
)
_MAY_BE_NULL = ("vocab_size", "head_dim", "local_attention_window")
_POSITIVE = ("rope_theta", "rms_norm_eps")
_NOT_NEGATIVE = ("logit_softcap", "z_loss_weight")

IMPLIED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}
"""Model types of other families that this architecture can express, and what each implies."""


def _key_problem(key: str, value: object) -> str | None:
    """The rule that the value breaks, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _SIZES:
        if value is None and key in _MAY_BE_NULL:
            return None
        sound, rule = is_number and isinstance(value, int) and value > 0, "a whole number above 0"
    elif key in _POSITIVE:
        sound, rule = is_number and 0 < value < float("inf"), "a number above 0"  # type: ignore[operator]
    elif key in _NOT_NEGATIVE:
        if value is None:
            return None
        sound, rule = is_number and 0 <= value < float("inf"), "0 or a number above it"  # type: ignore[operator]
    else:
        sound, rule = isinstance(value, bool), "true or false"
    return None if sound else f'"{key}" is {json.dumps(value)}; it must be {rule}'


def _foreign_problems(document: dict[str, Any]) -> list[str]:
    """What the file asks for and ``ArgonneModel`` lacks; to ignore it would train another model."""
    problems = []
    model_type = document.get("model_type")
    if isinstance(model_type, str) and not model_type.startswith("argonne") and model_type not in IMPLIED:
        problems.append(f'"model_type" is "{model_type}"; it must be argonne2 or one of {", ".join(IMPLIED)}')
    for key in ("rope_scaling", "rope_parameters"):
        rope = document.get(key)
        given = rope if isinstance(rope, dict) else {}
        settings = {name: value for name, value in given.items() if value is not None}
        kinds = {settings.pop("rope_type", "default"), settings.pop("type", "default")}
        settings.pop("rope_theta", None)
        if settings.pop("partial_rotary_factor", 1.0) != 1.0 or settings or kinds != {"default"}:
            problems.append(
                f'"{key}" asks for {json.dumps(rope)}; only the default rotary embedding is supported'
            )
    known = MODEL_KEYS | {"rope_scaling", "rope_parameters"}
    if foreign := foreign_keys(document, known):
        problems.append(
            f"it has {', '.join(foreign)}, which this model does not know: it would be another one"
        )
    return problems


def read_config_document(path: Path, flag: str) -> dict[str, Any]:
    """The JSON object in a config.json; ConfigError names ``flag`` and what is wrong with the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be read ({error.strerror}): give a config.json or one of "
            f"{', '.join(PRESETS)}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{flag} {path} is not valid JSON ({error}): fix or replace the file") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{flag} {path} holds no JSON object: give a model's config.json")
    return document


def load_model_settings(name: str) -> dict[str, Any]:
    """Keyword arguments of ``ArgonneConfig`` for a preset's name, a ``config.json`` or the folder it lies in.

    Keys that the file lacks take Argonne 2.0's values (biases off). ``vocab_size`` and ``head_dim`` are in
    the result only where the file gives them. Files of Llama, Mistral, Qwen2 and Qwen3 are read too.

    Raises:
        ConfigError: unknown name, invalid JSON, a value that cannot be, or a key that would make another
            model (all of them in the one line).
    """
    if name in PRESETS:
        return dict(PRESETS[name])
    return settings_of_file(Path(name), "--model-config")


def settings_of_file(name: Path, flag: str) -> dict[str, Any]:
    """As `load_model_settings`, of a ``config.json`` or the folder it lies in; messages name ``flag``."""
    path = name.expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise ConfigError(
            f"{flag} {name} is neither a preset nor a file: use {', '.join(PRESETS)}, "
            f"or the path of a config.json"
        )
    document = read_config_document(path, flag)
    return settings_of_document(document, f"{flag} {path}")


def settings_of_document(document: dict[str, Any], place: str) -> dict[str, Any]:
    """As `load_model_settings`, of the contents of a ``config.json`` found at ``place``."""
    rope = document.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        document.setdefault("rope_theta", rope["rope_theta"])
    given = {key: document[key] for key in document if key in MODEL_KEYS}
    problems = [problem for key, value in given.items() if (problem := _key_problem(key, value))]
    problems += _foreign_problems(document)
    settings = {**PRESETS[REFERENCE], **{key: value for key, value in given.items() if value is not None}}
    if not problems:
        settings |= IMPLIED.get(document.get("model_type", ""), {})
        heads, key_value_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
        head_dim = settings.get("head_dim", settings["hidden_size"] // heads)
        if heads % key_value_heads:
            problems.append(
                f'"num_attention_heads" {heads} is not a multiple of "num_key_value_heads" {key_value_heads}'
            )
        if head_dim < 2 or head_dim % 2:
            problems.append(
                f"the head dimension {head_dim} is odd; the rotary embedding rotates pairs: make it even"
            )
        if settings["interleaved_local_attention"] and settings["local_attention_window"] is None:
            problems.append('"interleaved_local_attention" needs a "local_attention_window"')
    if problems:
        raise ConfigError(f"{place}: {'; '.join(problems)}")
    return settings


def check_stored_config(metadata: Mapping[str, Any], place: Path | str) -> dict[str, Any]:
    """What a checkpoint's own ``model_config`` says beyond its tensors: a rotary base told in another place.

    ``metadata`` is the checkpoint's; without a ``model_config`` there is nothing to say. Raises
    CheckpointError naming every key that would make another model, or whose value cannot be.
    """
    document = metadata.get("model_config")
    if not isinstance(document, dict):
        return {}
    given = {key: document[key] for key in document if key in MODEL_KEYS and document[key] is not None}
    problems = [problem for key, value in given.items() if (problem := _key_problem(key, value))]
    problems += _foreign_problems(document)
    if problems:
        raise CheckpointError(
            f"checkpoint {place} has a model_config that this model cannot follow: {'; '.join(problems)}"
        )
    rope = document.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) and "rope_theta" not in document else None
    return {} if theta is None else {"rope_theta": theta}
