"""The configuration of a checkpoint's model: its own or its tensors', compared with ``--model-config``."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from argonne.config.families import read_folder_config
from argonne.config.options import RunConfig
from argonne.config.presets import MODEL_KEYS, PRESETS, REFERENCE, check_stored_config, load_model_settings
from argonne.errors import CheckpointError
from checkpointing import (
    CheckpointReader,
    CheckpointView,
    InitialWeights,
    check_model_config,
    choose_checkpoint,
    infer_model_config,
)


def resolve_model_config(
    reader: CheckpointReader | CheckpointView,
    name: str | None,
    settings: Mapping[str, Any] | None = None,
    *,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """The configuration of the model in a checkpoint; ``name`` is ``--model-config``, None without the flag.

    The checkpoint's own; where it carries none, its tensors', and the heads and the rest of ``name`` (else of
    Argonne 2.0). ``settings`` are those of ``name`` where they have been read; ``ignored`` keys are not
    compared. Raises ConfigError for a wrong
    ``name``, CheckpointError naming both values where the two differ, and where ``name`` must be given.
    """
    without = not isinstance(reader.metadata.get("model_config"), dict)
    if name is None and without and any("q_norm" in weight for weight in reader.model):
        raise CheckpointError(
            f"checkpoint {reader.path} has norms on its heads and no model_config, and tensors do not show "
            "soft cap, local attention and z-loss: give --model-config (argonne-3.0, or its config.json)"
        )
    given = dict(settings or load_model_settings(name or REFERENCE))
    stored = check_stored_config(reader.metadata, reader.path)
    config = {**infer_model_config(reader, given), **stored}  # type: ignore[arg-type]
    if name is None:
        return config
    explicit = explicit_keys(name, given)
    if without and name in PRESETS:  # the sizes are read from the tensors
        explicit = {"num_attention_heads", "num_key_value_heads", "qk_norm", "v_norm", "sandwich_norm"}
    check_model_config(config, {key: given[key] for key in explicit.difference(ignored)}, reader.path)
    return config


def planned_model(config: RunConfig) -> tuple[Mapping[str, Any] | None, str]:
    """(configuration, what to call it) of the model that a run would train, no weight read or proved.

    That of the checkpoint or the weights that the flags name; else of ``--model-config``, whatever another
    run has left in the output folder; else of the newest checkpoint there; None for the reference. Raises
    the run's own errors where what it would begin with is not there, cannot be opened, or is another model
    than ``--model-config``.
    """
    begin, model = config.checkpoint, config.model
    if model.model_config is not None and begin.checkpoint_path is None and begin.init_from is None:
        return model.settings, model.model_config
    initial = (
        InitialWeights(path=begin.init_from, folder_config=read_folder_config) if begin.init_from else None
    )
    choice = choose_checkpoint(
        begin.checkpoint_path,
        Path(config.output.output_dir),
        force_from_scratch=begin.force_from_scratch,
        initial=initial,
        verify=False,
    )
    if choice.reader is None:
        return model.settings, model.model_config or REFERENCE
    off = ("interleaved_local_attention", "local_attention_window") if model.local_attention == "off" else ()
    settings = resolve_model_config(choice.reader, model.model_config, model.settings, ignored=off)
    settings = {key: value for key, value in settings.items() if key in MODEL_KEYS and value is not None}
    return settings, f"the model of {choice.reader.path}"


def explicit_keys(name: str, settings: Mapping[str, Any]) -> set[str]:
    """Keys that ``--model-config`` itself states (a file's other keys are Argonne 2.0's values filled in)."""
    if name in PRESETS:
        return set(settings)
    path = Path(name).expanduser()
    document = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    return set(document) & set(settings)


def local_attention_line(settings: Mapping[str, Any]) -> str | None:
    """Which layers attend locally, for the console; None where none does."""
    if not settings.get("interleaved_local_attention"):
        return None
    layers = settings["num_hidden_layers"]
    return (
        f"Local attention in layers {', '.join(map(str, range(1, layers, 2)))} of {layers}: "
        f"{settings['local_attention_window']} tokens back, as the configuration says; the released Argonne "
        "3.0 and 3.5 weights were trained without a window (--local-attention off turns it off)"
    )
