"""Reading tensors of one safetensors file in place: its header, checked, and rectangles out of its mapping.

The format (https://github.com/huggingface/safetensors): the header's length in 8 bytes, the header as JSON
(name -> dtype, shape, first and last + 1 byte of the data), the tensors without a gap.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from argonne.checkpoint.safe_pickle import MAX_DIMENSIONS, TensorRef, contiguous_ref
from argonne.checkpoint.tensor_file import CARRIER, FileTensor
from argonne.errors import CheckpointError, one_line

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MAX_HEADER_BYTES = 100 << 20
_LENGTH_BYTES = 8


class SafetensorsFile:
    """One safetensors file, mapped; ``tensors`` by name, all of them checked against the file.

    Raises CheckpointError (without the path) for a file that is cut, damaged, or holds other numbers than
    bfloat16, float16 and float32.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError("no such file")
        self.size = path.stat().st_size
        if self.size < _LENGTH_BYTES:
            raise CheckpointError(f"{self.size} bytes: cut, or not safetensors")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", self._map[:_LENGTH_BYTES])
        if length > min(_MAX_HEADER_BYTES, self.size - _LENGTH_BYTES):
            raise CheckpointError(f"{self.size} bytes and a header of {length}: cut, or not safetensors")
        self._data = _LENGTH_BYTES + length
        header = self._map[_LENGTH_BYTES : self._data]
        self._offsets: dict[str, int] = {}
        self.tensors = self._index(_parse(header))
        self.identity = hashlib.sha256(header + struct.pack("<Q", self.size)).hexdigest()

    def _index(self, header: dict[str, Any]) -> dict[str, FileTensor]:
        spans = []
        tensors: dict[str, FileTensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, first, last = _entry(name, entry)
            spans.append((first, last, name))
            self._offsets[name] = self._data + first
            tensors[name] = FileTensor(self, contiguous_ref(name, dtype, shape))
        position = 0
        for first, last, name in sorted(spans):
            if first != position:
                raise CheckpointError(
                    f"tensor {name} begins at byte {first}, where {position} is due: damaged"
                )
            position = last
        if self._data + position != self.size:
            raise CheckpointError(
                f"{self.size} bytes where its tensors need {self._data + position}: cut or damaged"
            )
        return tensors

    def view(self, ref: TensorRef) -> np.ndarray:
        """The elements of a tensor in the mapping, as unsigned integers of their width; read-only."""
        carrier = CARRIER[ref.dtype.itemsize]
        if ref.numel == 0:
            return np.empty(ref.size, dtype=carrier)
        return np.ndarray(ref.size, dtype=carrier, buffer=self._map, offset=self._offsets[ref.storage.key])


def _parse(header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        document = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is damaged ({one_line(error)[:100]})") from error
    if not isinstance(document, dict):
        raise CheckpointError("its header is damaged (no JSON object)")
    return document


def _entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last + 1 byte of a header's entry."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"tensor {name} has no description: damaged")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"tensor {name} holds {dtype!r}, not one of {', '.join(DTYPES)}"[:300])
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and len(shape) <= MAX_DIMENSIONS):
        raise CheckpointError(f"tensor {name} has shape {shape!r} at {offsets!r}: damaged"[:300])
    first, last = offsets
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"tensor {name} of shape {shape!r} lies in {last - first} bytes: damaged"[:300])
    return DTYPES[dtype], tuple(shape), first, last


def _counts(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
