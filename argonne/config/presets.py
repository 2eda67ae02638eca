"""``--model-config``: the preset shapes, and a ``config.json`` completed from Argonne 2.0.

Standard library only: a wrong shape is refused before torch is imported.
"""

import json
from pathlib import Path
from typing import Any

from argonne.errors import ConfigError

REFERENCE = "argonne-2.0"

_COMMON: dict[str, Any] = {
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def _shape(hidden: int, layers: int, heads: int, key_value_heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate,
        **_COMMON,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "argonne-tiny": _shape(128, 4, 8, 4, 352),
    "argonne-small": _shape(1024, 16, 16, 8, 2816),
    "argonne-medium": _shape(2048, 20, 16, 8, 5632),
    REFERENCE: _shape(4080, 24, 24, 8, 11008),
}
"""Keyword arguments of ``ArgonneConfig``, all but ``vocab_size``, which the tokenizer gives."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
_MAY_BE_NULL = ("vocab_size", "head_dim")
_POSITIVE = ("rope_theta", "rms_norm_eps")
_FRACTIONS = ("attention_dropout", "hidden_dropout")
_SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings")
_KNOWN_KEYS = (*_SIZES, *_POSITIVE, *_FRACTIONS, *_SWITCHES)

_LLAMA_LIKE = ("llama", "mistral")


def _key_problem(key: str, value: object) -> str | None:
    """The rule that the value breaks, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _SIZES:
        if value is None and key in _MAY_BE_NULL:
            return None
        sound, rule = is_number and isinstance(value, int) and value > 0, "a whole number above 0"
    elif key in _POSITIVE:
        sound, rule = is_number and 0 < value < float("inf"), "a number above 0"  # type: ignore[operator]
    elif key in _FRACTIONS:
        sound, rule = is_number and 0 <= value < 1, "a number from 0 up to, not including, 1"  # type: ignore[operator]
    else:
        sound, rule = isinstance(value, bool), "true or false"
    return None if sound else f'"{key}" is {json.dumps(value)}; it must be {rule}'


def _foreign_problems(document: dict[str, Any]) -> list[str]:
    """What the file asks for and ``ArgonneModel`` lacks; to ignore it would train another model."""
    problems = []
    model_type = document.get("model_type")
    if isinstance(model_type, str) and not model_type.startswith("argonne") and model_type not in _LLAMA_LIKE:
        problems.append(
            f'"model_type" is "{model_type}"; it must be argonne2 or a Llama-like one (llama, mistral)'
        )
    if document.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f'"hidden_act" is {json.dumps(document["hidden_act"])}; this model only has "silu"')
    for key in ("rope_scaling", "rope_parameters"):
        rope = document.get(key)
        kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
        if kind not in (None, "default"):
            problems.append(
                f'"{key}" asks for {json.dumps(kind)}; only the default rotary embedding is supported'
            )
    return problems


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--model-config {path} cannot be read ({error.strerror}): give a config.json or one of "
            f"{', '.join(PRESETS)}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"--model-config {path} is not valid JSON ({error}): fix or replace the file"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"--model-config {path} holds no JSON object: give a model's config.json")
    return document


def load_model_settings(name: str) -> dict[str, Any]:
    """Keyword arguments of ``ArgonneConfig`` for a preset's name, a ``config.json`` or the folder it lies in.

    Keys that the file lacks take Argonne 2.0's values (biases off); keys that ``ArgonneConfig`` does not have
    are left out. ``vocab_size`` and ``head_dim`` are in the result only where the file gives them.

    Raises:
        ConfigError: unknown name, invalid JSON, or a value that cannot be (all of them in the one line).
    """
    if name in PRESETS:
        return dict(PRESETS[name])
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise ConfigError(
            f"--model-config {name} is neither a preset nor a file: use {', '.join(PRESETS)}, "
            f"or the path of a config.json"
        )
    document = _read_document(path)
    rope = document.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        document.setdefault("rope_theta", rope["rope_theta"])
    given = {key: document[key] for key in _KNOWN_KEYS if key in document}
    problems = [problem for key, value in given.items() if (problem := _key_problem(key, value))]
    problems += _foreign_problems(document)
    settings = {**PRESETS[REFERENCE], **{key: value for key, value in given.items() if value is not None}}
    if not problems:
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
    if problems:
        raise ConfigError(f"--model-config {path}: {'; '.join(problems)}")
    return settings
