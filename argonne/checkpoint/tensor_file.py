"""Reading tensors of one checkpoint file in place: an index of the file, and rectangles out of its mapping.

Both serializations of ``torch.save`` are read, the zip archive and the legacy stream. Nothing is loaded
but the rectangles asked for: the file is mapped, and a read copies its elements into fresh memory, a few
megabytes at a time.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from argonne.checkpoint.archive import read_archive_index
from argonne.checkpoint.safe_pickle import MAX_PICKLE_BYTES, TensorRef, check_tensor, load_tree, map_tensors
from argonne.errors import CheckpointError

Shape = tuple[int, ...]

_CHUNK_BYTES = 4 << 20
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03."
CARRIER: dict[int, np.dtype] = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
"""Unsigned integers by width in bytes, in which elements of any dtype are carried."""


class TensorSource(Protocol):
    """A tensor somewhere in one or more files, readable by rectangle."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read_into(self, out: torch.Tensor, start: Shape) -> None:
        """Fill ``out`` with the elements from ``start`` on, converted to its dtype."""


class MappedFile(Protocol):
    """A file whose tensors can be looked at in place."""

    def view(self, ref: TensorRef) -> np.ndarray: ...


def read_rectangle(
    source: TensorSource, start: Shape, size: Shape, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The rectangle of a source as a fresh CPU tensor. Raises CheckpointError where it leaves the tensor."""
    inside = len(start) == len(size) == len(source.shape) and all(
        0 <= first and 0 <= extent and first + extent <= whole
        for first, extent, whole in zip(start, size, source.shape, strict=True)
    )
    if not inside:
        raise CheckpointError(f"rectangle {start} + {size} does not lie in a tensor of shape {source.shape}")
    out = torch.empty(size, dtype=dtype)
    source.read_into(out, start)
    return out


class TensorFile:
    """One file that ``torch.save`` or :mod:`argonne.checkpoint.archive` wrote, mapped.

    ``tree`` holds its containers with :class:`TensorRef` leaves, all of them checked against the file;
    ``identity`` is a digest of its header and size, the same on every rank that sees the same file.
    Raises CheckpointError naming the file for anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open()
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error

    def _open(self) -> None:
        if not self.path.is_file():
            raise CheckpointError("no such file")
        self.size = self.path.stat().st_size
        if self.size == 0:
            raise CheckpointError("the file is empty (0 bytes)")
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._map[:4] == b"PK\3\4":
            self.serialization = "zip"
            header, offsets = self._index_zip()
        elif self._map[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC:
            self.serialization = "legacy"
            header, offsets = self._index_legacy()
        else:
            raise CheckpointError(f"{self.size} bytes that torch.save did not write, or cut")
        self._offsets = offsets
        self.identity = hashlib.sha256(header + struct.pack("<Q", self.size)).hexdigest()

    def _index_zip(self) -> tuple[bytes, dict[str, int]]:
        index = read_archive_index(self.path)
        records = index.records
        span = records["data.pkl"]
        if span.size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"its data.pkl has {span.size} bytes, too many for a checkpoint")
        header = self._map[span.offset : span.offset + span.size]
        if index.has_checksums and zlib.crc32(header) != span.crc:
            raise CheckpointError("record data.pkl does not match its checksum")
        order = records.get("byteorder")
        if order and self._map[order.offset : order.offset + order.size] != b"little":
            raise CheckpointError("it was written on a big-endian machine")
        self.tree, _ = load_tree(header)
        offsets: dict[str, int] = {}

        def visit(name: str, ref: TensorRef) -> None:
            check_tensor(name, ref)
            record = records.get(f"data/{ref.storage.key}")
            if record is None:
                raise CheckpointError(f"tensor {name} refers to record {ref.storage.key}, which is not there")
            if ref.storage.numel * ref.dtype.itemsize > record.size:
                raise CheckpointError(
                    f"tensor {name} needs {ref.storage.numel * ref.dtype.itemsize} bytes, its record has "
                    f"{record.size}"
                )
            offsets[ref.storage.key] = record.offset

        map_tensors(self.tree, visit)
        self.sealed = index.sealed
        self.has_checksums = index.has_checksums
        return header, offsets

    def _index_legacy(self) -> tuple[bytes, dict[str, int]]:
        self.sealed = self.has_checksums = False
        position = len(_LEGACY_MAGIC)
        system, position = self._legacy_pickle(position)
        if not isinstance(system, dict) or not system.get("little_endian"):
            raise CheckpointError("it was written on a big-endian machine")
        self.tree, position = self._legacy_pickle(position)
        keys, position = self._legacy_pickle(position)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError("its list of storages is damaged")
        header = self._map[:position]
        widths: dict[str, int] = {}
        numels: dict[str, int] = {}

        def visit(name: str, ref: TensorRef) -> None:
            check_tensor(name, ref)
            widths[ref.storage.key] = ref.dtype.itemsize
            numels[ref.storage.key] = ref.storage.numel

        map_tensors(self.tree, visit)
        offsets: dict[str, int] = {}
        for key in keys:
            if position + 8 > self.size:
                raise CheckpointError(
                    f"{self.size} bytes: cut before storage {len(offsets) + 1} of {len(keys)}"
                )
            (numel,) = struct.unpack("<q", self._map[position : position + 8])
            if key not in widths or numel != numels[key]:
                raise CheckpointError(f"storage {len(offsets) + 1} does not have the size its tensors need")
            offsets[key] = position + 8
            position += 8 + numel * widths[key]
        if position != self.size:
            raise CheckpointError(f"has {self.size} bytes where its tensors need {position}")
        missing = set(widths) - set(offsets)
        if missing:
            raise CheckpointError(f"{len(missing)} of its tensors have no bytes in the file")
        return header, offsets

    def _legacy_pickle(self, position: int) -> tuple[Any, int]:
        """One pickle of the legacy stream and where the next begins."""
        for window in (4 << 20, MAX_PICKLE_BYTES):
            try:
                tree, length = load_tree(self._map[position : position + window])
                return tree, position + length
            except CheckpointError:
                if position + window >= self.size or window == MAX_PICKLE_BYTES:
                    raise
        raise AssertionError("unreachable")

    def source(self, ref: TensorRef) -> FileTensor:
        """The tensor that a reference of this file's tree names."""
        return FileTensor(self, ref)

    def view(self, ref: TensorRef) -> np.ndarray:
        """The elements of a reference in the mapping, as unsigned integers of their width; read-only."""
        width = ref.dtype.itemsize
        if ref.numel == 0:
            return np.empty(ref.size, dtype=CARRIER[width])
        return np.ndarray(
            ref.size,
            dtype=CARRIER[width],
            buffer=self._map,
            offset=self._offsets[ref.storage.key] + ref.offset * width,
            strides=tuple(stride * width for stride in ref.stride),
        )


@dataclass(frozen=True)
class FileTensor:
    """One tensor of one file."""

    file: MappedFile
    ref: TensorRef

    @property
    def shape(self) -> Shape:
        return self.ref.size

    @property
    def dtype(self) -> torch.dtype:
        return self.ref.dtype

    def read_into(self, out: torch.Tensor, start: Shape) -> None:
        view = self.file.view(self.ref)
        if out.ndim == 0:
            out.copy_(torch.from_numpy(np.array([view[()]])).view(self.dtype)[0])
            return
        index = tuple(slice(first, first + extent) for first, extent in zip(start, out.shape, strict=True))
        view = view[index]
        row_bytes = math.prod(out.shape[1:]) * self.dtype.itemsize
        rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for first in range(0, out.shape[0], rows):
            chunk = np.array(view[first : first + rows], order="C")
            out[first : first + rows].copy_(torch.from_numpy(chunk).view(self.dtype))


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor cut along one dimension into pieces that lie in several files."""

    pieces: tuple[TensorSource, ...]
    dimension: int

    @property
    def shape(self) -> Shape:
        first = self.pieces[0].shape
        total = sum(piece.shape[self.dimension] for piece in self.pieces)
        return (*first[: self.dimension], total, *first[self.dimension + 1 :])

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def read_into(self, out: torch.Tensor, start: Shape) -> None:
        offset = 0
        first, last = start[self.dimension], start[self.dimension] + out.shape[self.dimension]
        for piece in self.pieces:
            extent = piece.shape[self.dimension]
            low, high = max(first, offset), min(last, offset + extent)
            if low < high:
                target = out.narrow(self.dimension, low - first, high - low)
                inner = (*start[: self.dimension], low - offset, *start[self.dimension + 1 :])
                piece.read_into(target, inner)
            offset += extent
