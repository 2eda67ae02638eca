"""Flat files of token ids in the public layout of llm.c, memory-mapped.

256 int32 of header (magic 20240520, version 1, number of tokens; the rest 0), then the ids as uint16, or as
uint32 where the size of the file says so. A file is read in blocks of BLOCK_TOKENS ids, which are its rows
here; a position names it by row 0 and the offset of a token in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from argonne.data.position import DataPosition
from argonne.data.remote import ShardPath
from argonne.data.texts import ShardError, TextBatch
from argonne.data.token_rows import TokenRow, beyond_vocabulary, checked_ids

FLAT_SUFFIX = ".bin"
MAGIC, VERSION = 20240520, 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
BLOCK_TOKENS = 1 << 16


def is_flat(name: str | ShardPath) -> bool:
    """Whether a shard is a flat file, by its name."""
    return str(name).endswith(FLAT_SUFFIX)


def flat_header(count: int) -> bytes:
    """The header of a file of ``count`` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:2] = MAGIC, VERSION
    header.view("<u4")[2] = count
    return header.tobytes()


def read_header(content: bytes, size: int) -> tuple[np.dtype[Any], int]:
    """(type of the ids, number of tokens) of a file of ``size`` bytes by its head, or ShardError."""
    if len(content) < HEADER_BYTES:
        raise ShardError(f"{size} bytes: shorter than the header of a flat token file")
    header = np.frombuffer(content[:HEADER_BYTES], dtype="<i4")
    if header[0] != MAGIC:
        raise ShardError(f"no flat token file: its first number is {header[0]}, not {MAGIC}")
    if header[1] != VERSION:
        raise ShardError(f"version {header[1]} of the flat token layout, only {VERSION} is known")
    count = int(header.view("<u4")[2])
    for kind in ("<u2", "<u4"):
        if size - HEADER_BYTES == count * np.dtype(kind).itemsize:
            return np.dtype(kind), count
    raise ShardError(
        f"its header says {count} tokens, and its {size} bytes hold neither as many of 2 bytes nor of 4"
    )


class FlatReader:
    """The blocks of one flat file, each a row and a row group of its own."""

    def __init__(self, path: ShardPath, vocab_size: int | None = None) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._size = path.stat().st_size
        self._file = path.open("rb")
        self._dtype, self.tokens = read_header(self._file.read(HEADER_BYTES), self._size)
        self.group_rows = (1,) * -(-self.tokens // BLOCK_TOKENS)
        self._map: np.ndarray | None = None
        if isinstance(path, Path) and self.tokens:
            self._map = np.memmap(path, self._dtype, "r", HEADER_BYTES, (self.tokens,))

    def __enter__(self) -> FlatReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._map = None
        self._file.close()

    def null_rows(self) -> int:
        """A block always has tokens."""
        return 0

    def text_bytes(self) -> int:
        """Bytes of the ids."""
        return self.tokens * self._dtype.itemsize

    def token_count(self) -> int:
        """Tokens in the file."""
        return self.tokens

    def batches(self, group: int) -> Iterator[TextBatch]:
        """One block. Raises ShardError for an id that the vocabulary does not have, OSError."""
        first = group * BLOCK_TOKENS
        raw = self._block(first, min(BLOCK_TOKENS, self.tokens - first))
        ids, wrong = checked_ids(raw, self._vocab_size)
        if wrong >= 0:
            where = f"token {first + wrong} of the file"
            raise ShardError(f"{where}: {beyond_vocabulary(ids[wrong], self._vocab_size)}")
        yield TextBatch([TokenRow(ids, is_block=True)], frozenset())

    def _block(self, first: int, count: int) -> np.ndarray:
        if self._map is not None:
            if self._path.stat().st_size < self._size:  # what is mapped and no longer there kills the process
                raise ShardError("it was cut while it was read")
            return np.array(self._map[first : first + count])
        self._file.seek(HEADER_BYTES + first * self._dtype.itemsize)
        return np.frombuffer(self._file.read(count * self._dtype.itemsize), self._dtype)


def block_position(position: DataPosition) -> DataPosition:
    """A position in the form in which a flat file is read: block and offset in it."""
    if not is_flat(position.file_name):
        return position
    blocks, offset = divmod(position.token_offset, BLOCK_TOKENS)
    return replace(position, row=position.row + blocks, token_offset=offset)


def file_position(position: DataPosition) -> DataPosition:
    """A position in the form that is saved: of a flat file, row 0 and the token's offset in the file."""
    if not is_flat(position.file_name):
        return position
    return replace(position, row=0, token_offset=position.row * BLOCK_TOKENS + position.token_offset)
