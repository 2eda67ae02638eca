"""Where the record batches of an Arrow IPC file or stream lie, by their headers alone.

Both forms are a chain of messages (Arrow columnar format, "Encapsulated message format"): a marker, the
length of the metadata, the metadata (a flatbuffer that tells rows, null counts and the body's length), the
body. pyarrow reads each body on its way along the chain, which over a network is the whole file.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

from argonne.data.texts import ShardError

_FILE_START = b"ARROW1\0\0"
_CONTINUES = 0xFFFFFFFF
_DICTIONARY, _BATCH = 2, 3
_FIRST_READ = 4096
"""Bytes asked for at a message; the metadata of a batch of some columns lies within them."""


@dataclass(frozen=True, kw_only=True)
class BatchPlace:
    """One record batch: bytes ``start`` to ``end`` of the file are its message."""

    start: int
    end: int
    rows: int
    null_counts: tuple[int, ...]
    """By field, nested ones behind their parent."""


def batch_places(file: io.RawIOBase, size: int) -> list[BatchPlace] | None:
    """The record batches of the open file of ``size`` bytes, in order.

    None where it holds dictionaries, without which its batches cannot be read alone. Raises ShardError for
    a chain that is cut or spoiled, OSError.
    """
    places, place = [], _file_start(file)
    while place < size:
        try:
            message, start = _metadata(file, place)
            if message is None:
                break
            kind = message.number(1, "<B", 0)
            body = message.number(3, "<q", 0)
            header = message.table(2)
            end = start + body
            if kind == _DICTIONARY:
                return None
            if kind == _BATCH:
                rows, nulls = header.number(0, "<q", 0), header.pairs(1)
                places.append(BatchPlace(start=place, end=end, rows=rows, null_counts=nulls))
        except (struct.error, IndexError) as error:
            raise ShardError(f"its message at byte {place} cannot be read") from error
        if body < 0 or end > size:
            raise ShardError(f"it was cut: its message at byte {place} ends at {end} of {size} bytes")
        place = end
    return places


def node_of(schema: Any, column: int) -> int:
    """Index in ``null_counts`` of a column of the pyarrow schema."""
    return sum(_nodes(schema.field(index).type) for index in range(column))


def _nodes(kind: Any) -> int:
    kind = getattr(kind, "storage_type", kind)
    return 1 + sum(_nodes(kind.field(index).type) for index in range(kind.num_fields))


def _file_start(file: io.RawIOBase) -> int:
    file.seek(0)
    return len(_FILE_START) if file.read(len(_FILE_START)) == _FILE_START else 0


def _metadata(file: io.RawIOBase, place: int) -> tuple[_Table | None, int]:
    """The message at ``place`` and where its body starts; None at the end of the chain."""
    file.seek(place)
    content = file.read(_FIRST_READ) or b""
    (length,) = struct.unpack_from("<I", content)
    start = 4
    if length == _CONTINUES:  # since Arrow 0.15; without the marker before
        (length,) = struct.unpack_from("<I", content, 4)
        start = 8
    if length == 0:
        return None, place + start
    if start + length > len(content):
        file.seek(place)
        content = file.read(start + length) or b""
    metadata = content[start : start + length]
    (root,) = struct.unpack_from("<I", metadata)
    return _Table(metadata, root), place + start + length


class _Table:
    """A table of a flatbuffer: fields by number, each optional (flatbuffers' "Internals")."""

    def __init__(self, content: bytes, place: int) -> None:
        self._content, self._place = content, place
        (back,) = struct.unpack_from("<i", content, place)
        self._fields = place - back
        (self._fields_bytes,) = struct.unpack_from("<H", content, self._fields)

    def _at(self, field: int) -> int | None:
        if 4 + 2 * field >= self._fields_bytes:
            return None
        (offset,) = struct.unpack_from("<H", self._content, self._fields + 4 + 2 * field)
        return self._place + offset if offset else None

    def number(self, field: int, form: str, default: int) -> int:
        at = self._at(field)
        return default if at is None else struct.unpack_from(form, self._content, at)[0]

    def _target(self, field: int) -> int:
        at = self._at(field)
        if at is None:
            raise IndexError(f"field {field} is missing")
        return at + struct.unpack_from("<I", self._content, at)[0]

    def table(self, field: int) -> _Table:
        return _Table(self._content, self._target(field))

    def pairs(self, field: int) -> tuple[int, ...]:
        """The second number of each pair of 64-bit integers in a vector: the null counts of its nodes."""
        at = self._target(field)
        (count,) = struct.unpack_from("<I", self._content, at)
        return struct.unpack_from(f"<{2 * count}q", self._content, at + 4)[1::2]
