"""A teacher's weights: the whole model by transformers, or the slices of this rank from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from argonne.config.distillation import FLAG
from argonne.errors import CheckpointError, ConfigError, one_line
from checkpointing import read_rectangle, weights_of_folder
from model import ArgonneConfig, ArgonneModel
from tp_shard import TPGroup, has_plan, shard_tensor_parallel

_HEAD_NAMES = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight")
"""Where a head's weight may be; that of a tied one is the embedding's."""


def whole_model(
    folder: Path, dtype: torch.dtype, device: torch.device, *, device_map: str | None, trust: bool
) -> nn.Module:
    """The whole teacher on ``device``, or where transformers puts it (``device_map``)."""
    from transformers import AutoModelForCausalLM

    try:
        if _model_type(folder) == ArgonneConfig.model_type and device_map is None:
            argonne: Any = ArgonneModel.from_pretrained(folder, dtype=dtype)
            return argonne.to(device)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device_map, trust_remote_code=trust
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{FLAG} {folder} cannot be loaded: {one_line(error)[:300]}") from error
    return model if device_map is not None else model.to(device)


def split_model(
    folder: Path, dtype: torch.dtype, device: torch.device, group: TPGroup, pad_to: int = 1
) -> nn.Module:
    """The teacher split over ``group``: this rank reads its own slices only.

    An Argonne teacher's widths are padded to a multiple of ``pad_to``, as the student's.
    """
    model_type = _model_type(folder)
    if not has_plan(model_type):
        raise ConfigError(
            f"{FLAG} {folder} is a {model_type}, for which there is no tensor-parallel plan: give another "
            "--teacher-device-map"
        )
    with torch.device("meta"):
        model = _described(folder)
    try:
        argonne = model_type == ArgonneConfig.model_type
        shard_tensor_parallel(model, group, pad_to=pad_to if argonne else 1)
    except ConfigError as error:
        raise ConfigError(f"{FLAG} {folder} cannot be split: {error}") from error
    model.to(dtype)
    _fill(model, folder, device, group)
    return model


def _described(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    if _model_type(folder) == ArgonneConfig.model_type:
        return ArgonneModel(ArgonneConfig.from_pretrained(folder))
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return model


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{FLAG} {folder / 'config.json'} cannot be read: {one_line(error)[:200]}"
        ) from error


def _fill(model: nn.Module, folder: Path, device: torch.device, group: TPGroup) -> None:
    """Make this rank's slices and read them; derived tables are computed again."""
    state: Any = model.tensor_parallel
    slice_map = state.slice_map
    model.to_empty(device=device)
    for name, module in list(model.named_modules()):
        if any(True for _ in module.buffers(recurse=False)):
            _compute_tables(model, name, module, device)
    found = weights_of_folder(folder, FLAG)
    parameters = dict(model.named_parameters())
    for name, local in parameters.items():
        local.detach().zero_()  # padding
        if name not in found:
            raise CheckpointError(f"{FLAG} {folder} lacks the weight {name}: copy the whole folder")
        source = found[name]
        if tuple(source.shape) != tuple(slice_map.shape(name)):
            raise CheckpointError(
                f"{FLAG} {folder}: {name} is {tuple(source.shape)}, and config.json asks for "
                f"{tuple(slice_map.shape(name))}"
            )
        for box in slice_map.rectangles(name, group.rank):
            values = read_rectangle(source, box.start, box.size, local.dtype)
            local.detach()[box.local_index].copy_(values)


def _compute_tables(model: nn.Module, name: str, module: nn.Module, device: torch.device) -> None:
    """Rotary tables, which no file holds, by a new module of the same kind."""
    config = getattr(module, "config", None)
    if config is None or "rotary" not in type(module).__name__.lower():
        raise ConfigError(f"{FLAG}: the teacher's module {name} has tables that cannot be made again here")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, type(module)(config=config).to(device))


def head_rows(
    folder: Path, rows: range, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None, int]:
    """Rows of the head's weight and bias from the folder, and how many rows the whole has."""
    found: Mapping[str, Any] = weights_of_folder(folder, FLAG)
    names = [name for name in _HEAD_NAMES if name in found]
    if not names:
        raise CheckpointError(f"{FLAG} {folder} has no head: neither lm_head.weight nor an embedding")
    source, bias = found[names[0]], found.get("lm_head.bias")
    total, width = source.shape
    valid = max(0, min(rows.stop, total) - rows.start)
    matrix = read_rectangle(source, (rows.start if valid else 0, 0), (valid, width), dtype).to(device)
    if bias is None:
        return matrix, None, total
    return matrix, read_rectangle(bias, (rows.start,), (valid,), dtype).to(device), total
