"""Export to a Hugging Face folder that opens without this repository.

The folder holds safetensors (in shards of at most 5 GB, written one tensor at a time), config.json,
generation_config.json, a model card and the tokenizer; as Argonne also the model's code, which the config's
``auto_map`` names and ``trust_remote_code`` follows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from argonne.checkpoint.archive import tensor_bytes
from argonne.checkpoint.commit import failure_reason
from argonne.checkpoint.convert import row_parts
from argonne.checkpoint.export_form import MODULE, SHOWN_KEYS, check_form, config_document, weight_name
from argonne.checkpoint.finite import require_finite
from argonne.checkpoint.model_card import WRITTEN_BY, model_card
from argonne.checkpoint.pretrained_folder import INDEX, SINGLE
from argonne.checkpoint.reader import HEAD, CheckpointReader
from argonne.checkpoint.safetensors_file import DTYPES
from argonne.checkpoint.streamed_file import StreamedFile
from argonne.checkpoint.tensor_file import TensorSource
from argonne.data.tokenizer import load_tokenizer
from argonne.errors import CheckpointError, ConfigError
from argonne.files import synchronize

SHARD_BYTES = 5_000_000_000
CARD = "README.md"
_SAFETENSORS_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_NAMES = {str(dtype): dtype for dtype in _SAFETENSORS_DTYPES}
"""What a checkpoint's ``model_dtype`` says, and the dtype."""


def export_hf(
    reader: CheckpointReader,
    model_config: Mapping[str, Any],
    tokenizer_path: str,
    output_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    form: str = "argonne",
    trust_remote_code: bool = False,
    flag: str = "--output-dir",
) -> Path:
    """Write the folder and return it.

    ``dtype`` is that of the weights (None: what the run trained in); ``form`` one of `FORMS`. The folder
    appears whole or not at all: everything is written beside it and renamed. An earlier export in
    ``output_dir`` is replaced; ``flag`` names the folder in messages. Raises ConfigError for any other
    folder that is not empty, for a tokenizer larger than the model's vocabulary and for a form that cannot
    express the model, DataError for a tokenizer that does not load, and CheckpointError where the disk
    fails or a weight is not finite.
    """
    output_dir = Path(output_dir)
    dtype = dtype or trained_dtype(reader)
    check_form(form, model_config)
    check_export_folder(output_dir, flag)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code)
    if len(tokenizer) > model_config["vocab_size"]:
        raise ConfigError(
            f"--tokenizer-path {tokenizer_path} has {len(tokenizer)} tokens and the model a vocabulary of "
            f"{model_config['vocab_size']}: give the tokenizer that it was trained with"
        )
    temporary = output_dir.parent / f".{output_dir.name}.{os.getpid()}.exporting"
    try:
        temporary.mkdir(parents=True)
        _write_weights(reader, temporary, dtype, form)
        _write_config(form, model_config, tokenizer, temporary, dtype)
        architecture = "ArgonneModel" if form == "argonne" else "LlamaForCausalLM"
        shown = {key: model_config[key] for key in SHOWN_KEYS if model_config.get(key) is not None}
        card = model_card(reader, shown, architecture=architecture, dtype=dtype)
        (temporary / CARD).write_text(card, encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        synchronize(temporary)
        _replace(temporary, output_dir)
    except OSError as error:
        reason = failure_reason(error, output_dir.parent)
        raise CheckpointError(f"export to {output_dir} failed: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output_dir


def check_export_folder(folder: Path, flag: str) -> None:
    """Raise ConfigError naming ``flag`` where an export would replace what is no export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{flag} {folder} is a file: name a folder")
    if any(folder.iterdir()) and not _is_export(folder):
        raise ConfigError(f"{flag} {folder} is not empty and not an earlier export: name another folder")


def _is_export(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        card = ""
    return WRITTEN_BY in card or (folder / f"{MODULE}.py").is_file()


def trained_dtype(reader: CheckpointReader) -> torch.dtype:
    """The dtype that the run trained in; that of the file's weights where it does not say."""
    told = DTYPE_NAMES.get(str(reader.metadata.get("model_dtype")))
    stored = {source.dtype for source in reader.model.values()}
    only = stored.pop() if len(stored) == 1 else torch.float32
    return told or (only if only in _SAFETENSORS_DTYPES else torch.float32)


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _replace(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    synchronize(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_weights(reader: CheckpointReader, folder: Path, dtype: torch.dtype, form: str) -> None:
    names = [name for name in reader.model if not (reader.tied and name == HEAD)]
    shards = plan_shards({name: math.prod(reader.shape(name)) * dtype.itemsize for name in names})
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file_name = SINGLE
        if len(shards) > 1:
            file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weights = {weight_name(form, name): reader.model[name] for name in shard}
        _write_safetensors(folder / file_name, weights, dtype)
        weight_map.update(dict.fromkeys(weights, file_name))
    if len(shards) > 1:
        total = sum(math.prod(reader.shape(name)) * dtype.itemsize for name in names)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def plan_shards(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Names in order, cut into runs of at most ``limit`` bytes (a larger tensor is alone)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_safetensors(path: Path, weights: Mapping[str, TensorSource], dtype: torch.dtype) -> None:
    """The safetensors layout: length of the header (8 bytes), JSON header, tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, source in weights.items():
        size = math.prod(source.shape) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(source.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as opened, StreamedFile(opened.fileno()) as file:
        file.append(struct.pack("<Q", len(encoded)) + encoded)
        for name, source in weights.items():
            for chunk in row_parts(source, dtype):
                require_finite(chunk, name)
                file.append(tensor_bytes(chunk))
        file.finish()


def _write_config(
    form: str, model_config: Mapping[str, Any], tokenizer: Any, folder: Path, dtype: torch.dtype
) -> None:
    from transformers import GenerationConfig

    import model

    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config_document(form, model_config, dtype, ids))
    if form == "argonne":
        shutil.copyfile(Path(model.__file__), folder / f"{MODULE}.py")
    GenerationConfig(**{key: value for key, value in ids.items() if value is not None}).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' own messages while a folder is written."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
