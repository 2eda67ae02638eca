"""The config.json of a folder of weights: of Argonne, or of a family that this architecture can express.

Standard library only: a folder of another architecture is refused before torch is imported.
"""

from pathlib import Path
from typing import Any

from argonne.config.presets import read_config_document, settings_of_document

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
}

FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}
"""What a key means that the config.json of another family leaves out (the defaults of transformers)."""
_ROPE_THETA = 10000.0
"""Of all four."""


def with_family_defaults(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its own family's values where it has none; an Argonne document as it is."""
    defaults = FAMILY_DEFAULTS.get(document.get("model_type", ""))
    if defaults is None:
        return dict(document)
    stated = {key: value for key, value in document.items() if value is not None or key == "sliding_window"}
    completed = {**defaults, **stated}
    rope = completed.get("rope_parameters")
    if not (isinstance(rope, dict) and "rope_theta" in rope):
        completed.setdefault("rope_theta", _ROPE_THETA)
    completed.setdefault("num_key_value_heads", completed["num_attention_heads"])
    return completed


def read_folder_config(folder: Path, flag: str) -> tuple[dict[str, Any], str]:
    """Keyword arguments of ``ArgonneConfig`` from a folder's config.json, and the folder's model_type.

    Raises ConfigError, naming the key, for what this architecture does not express.
    """
    path = folder / "config.json"
    document = read_config_document(path, flag)
    model_type = document.get("model_type", "argonne2")
    return settings_of_document(with_family_defaults(document), f"{flag} {path}"), str(model_type)
