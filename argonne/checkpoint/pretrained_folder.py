"""A Hugging Face folder of weights as a checkpoint: config.json, and safetensors in one file or many.

Names of Llama, Mistral, Qwen2 and Qwen3 become this model's. Every weight that the configuration asks for
must be there in its shape, and no other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from argonne.checkpoint.family_names import argonne_name, llama_name
from argonne.checkpoint.reader import HEAD, KIND_WEIGHTS, CheckpointReader, same_bytes
from argonne.checkpoint.safetensors_file import SafetensorsFile
from argonne.checkpoint.shape import EMBEDDING, expected_shapes
from argonne.checkpoint.tensor_file import FileTensor, Shape, TensorSource
from argonne.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
"""A table that old conversions of Llama kept, computed from the configuration."""


def is_weights_folder(path: Path) -> bool:
    """Whether a folder holds Hugging Face weights: a config.json and safetensors, or their index."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors*"))


@dataclass(frozen=True)
class Zeros:
    """A parameter that the folder's architecture lacks and this one has: zero."""

    shape: Shape
    dtype: torch.dtype = torch.float32

    def read_into(self, out: torch.Tensor, start: Shape) -> None:
        out.zero_()


def open_folder(folder: Path, settings: Mapping[str, Any], model_type: str, flag: str) -> CheckpointReader:
    """Open a folder's weights; ``settings`` are what its config.json says.

    Reads headers only. Raises CheckpointError in one line that names ``flag``, folder and file or tensor.
    """
    try:
        files, placed = _files(folder)
        found = _by_name(files, placed)
        config = dict(settings)
        if config.get("vocab_size") is None and EMBEDDING in found:
            config["vocab_size"] = found[EMBEDDING][1].shape[0]
        model, notes = _model(found, config, model_type)
    except CheckpointError as error:
        raise CheckpointError(f"{flag} {folder}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{flag} {folder} cannot be read: {error.strerror or error}") from error
    digest = hashlib.sha256("".join(file.identity for file in files).encode())
    return CheckpointReader(
        path=folder,
        kind=KIND_WEIGHTS,
        metadata={"model_config": config, "model_type": model_type},
        tied=bool(config["tie_word_embeddings"]),
        model=model,
        adam={},
        adam_note="a folder of weights has no optimizer state",
        size=sum(file.size for file in files),
        identity=digest.hexdigest(),
        warnings=notes,
    )


def weights_of_folder(folder: Path, flag: str) -> dict[str, FileTensor]:
    """All tensors of a folder by the folder's own names, mapped. Raises CheckpointError naming ``flag``."""
    try:
        files, placed = _files(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{flag} {folder}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{flag} {folder} cannot be read: {error.strerror or error}") from error
    return {
        name: tensor
        for file in files
        for name, tensor in file.tensors.items()
        if placed is None or placed.get(name) == file.path.name
    }


def _files(folder: Path) -> tuple[list[SafetensorsFile], dict[str, str] | None]:
    """The folder's files, and what its index says: tensor -> file name (None without an index)."""
    if (folder / SINGLE).is_file():
        return [_open(folder, SINGLE)], None
    if not (folder / INDEX).is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(names) == 1:
            return [_open(folder, names[0])], None
        raise CheckpointError(f"{len(names)} safetensors files and no {INDEX}: copy the whole folder")
    try:
        placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{INDEX} is not an index of weights: copy the file again") from error
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{INDEX} names no weights: copy the file again")
    for name, file in placed.items():
        if (
            not isinstance(file, str)
            or file in ("", ".", "..")
            or "/" in file
            or "\\" in file
            or "\0" in file
        ):
            raise CheckpointError(f"{INDEX} puts {name} outside the folder: {file!r}"[:300])
    return [_open(folder, file) for file in sorted(set(placed.values()))], placed


def _open(folder: Path, name: str) -> SafetensorsFile:
    try:
        return SafetensorsFile(folder / name)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _by_name(
    files: list[SafetensorsFile], placed: dict[str, str] | None
) -> dict[str, tuple[str, FileTensor]]:
    """This model's name -> (name in the folder, tensor), as the index places them."""
    found: dict[str, tuple[str, FileTensor]] = {}
    for file in files:
        for raw, tensor in file.tensors.items():
            if placed is not None and placed.get(raw) != file.path.name:
                where = f"in {placed[raw]}" if raw in placed else "nowhere"
                raise CheckpointError(f"{file.path.name} holds {raw}, which {INDEX} puts {where}")
            if _DERIVED.search(raw):
                continue
            name = argonne_name(raw)
            if name in found:
                raise CheckpointError(f"{raw} and {found[name][0]} are the same weight")
            found[name] = raw, tensor
    for raw, file_name in (placed or {}).items():
        if not any(raw in file.tensors for file in files):
            raise CheckpointError(f"{INDEX} puts {raw} in {file_name}, which lacks it")
    return found


def _model(
    found: Mapping[str, tuple[str, FileTensor]], config: Mapping[str, Any], model_type: str
) -> tuple[dict[str, TensorSource], tuple[str, ...]]:
    """The weights in the model's order, and notes for the console."""
    expected = expected_shapes(config)
    tied = config["tie_word_embeddings"]
    model: dict[str, TensorSource] = {}
    missing = []
    invented = []
    for name, shape in expected.items():
        if name in found:
            raw, tensor = found[name]
            if tensor.shape != shape:
                raise CheckpointError(f"{raw} is {tensor.shape}, and config.json asks for {shape}")
            model[name] = tensor
        elif model_type == "qwen2" and name.endswith("attn.o_proj.bias"):
            model[name] = Zeros(shape)
            invented.append(name)
        else:
            missing.append(name if model_type.startswith("argonne") else llama_name(name))
    surplus = [
        raw for name, (raw, _) in found.items() if name not in expected and not (tied and name == HEAD)
    ]
    if missing or surplus:
        parts = [f"{len(missing)} weights are missing, such as {missing[0]}"] if missing else []
        parts += [f"{len(surplus)} have no place in the model, such as {surplus[0]}"] if surplus else []
        raise CheckpointError(f"{'; '.join(parts)}: config.json and weights are not of one model")
    if tied:
        if HEAD in found and not same_bytes(found[HEAD][1], found[EMBEDDING][1]):
            raise CheckpointError(
                f"{found[HEAD][0]} differs from {found[EMBEDDING][0]}, and config.json says that they are "
                'tied: set "tie_word_embeddings" to false, or remove the head'
            )
        model[HEAD] = model[EMBEDDING]
    notes = f"{model_type} has no bias in its output projections: {len(invented)} begin at zero"
    return model, (notes,) if invented else ()
