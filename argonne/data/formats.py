"""Recognize a shard's format, check it by its footer, and open its reader."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from argonne.data.arrow_reader import ARROW_FILE_MAGIC, ArrowReader
from argonne.data.flat_tokens import FlatReader, is_flat
from argonne.data.parquet_reader import ParquetReader
from argonne.data.remote import ShardPath
from argonne.data.shard_reader import ShardReader
from argonne.data.texts import ShardError
from argonne.errors import one_line

TAIL_BYTES = 1 << 16
WHOLE_BYTES = 32 << 20
"""A file of at most this size is hashed whole, a larger one in SAMPLES stretches of SAMPLE_BYTES."""
SAMPLES = 64
SAMPLE_BYTES = 1 << 14
FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer, not the data: fetch it with `git lfs pull`"),
    (b"<!doctype html", "an HTML page, as a failed download leaves it: download the shard again"),
    (b"<html", "an HTML page, as a failed download leaves it: download the shard again"),
    (b"<?xml", "an XML page, as a failed download leaves it: download the shard again"),
    (b"{", "JSON: make parquet of it with scripts/prepare_data.py"),
    (b"[", "JSON: make parquet of it with scripts/prepare_data.py"),
    (b"\x1f\x8b", "a gzip file: unpack it, or make parquet of it with scripts/prepare_data.py"),
    (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it, or make parquet of it with scripts/prepare_data.py"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"PARE", "an encrypted parquet file: give a decrypted copy"),
)
"""First bytes (lower case, without white space before them) of what is often taken for a shard."""


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What the start-up check learns of one shard without reading its rows."""

    group_rows: tuple[int, ...]
    """Rows of each row group."""
    null_rows: int = 0
    """Rows without a text by the footer's statistics (0 where there are none)."""
    digest: str
    """`file_digest` of the file."""


def tail_digest(path: ShardPath) -> str:
    """Hash of the file's last 64 KiB, which hold a parquet file's row-group offsets and statistics."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        return hashlib.blake2b(file.read(), digest_size=8).hexdigest()


def content_digest(path: Path) -> str:
    """`tail_digest`, which alone an older version's checkpoint has, and behind it a hash of the content.

    Files of up to WHOLE_BYTES are read whole, of larger ones 1 MiB in evenly spaced stretches.
    """
    content = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            while chunk := file.read(1 << 20):
                content.update(chunk)
        else:
            for index in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                content.update(file.read(SAMPLE_BYTES))
    return tail_digest(path) + content.hexdigest()


def file_digest(path: ShardPath) -> str:
    """`content_digest` of a local file; of a remote one `tail_digest`: its content would have to travel."""
    return content_digest(path) if isinstance(path, Path) else tail_digest(path)


def foreign(head: bytes) -> str:
    """What a file that begins so is, with the remedy, where it is known and no shard; else ""."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, what in FOREIGN:
        if text.startswith(magic) or (magic.startswith(b"<") and text.lower().startswith(magic)):
            return what
    return ""


def read_footer(path: ShardPath, column: str) -> Footer:
    """Check one shard by its footer; raises ShardError with the reason it cannot be used."""
    import pyarrow as pa

    try:
        if path.stat().st_size == 0:
            raise ShardError("0 bytes")
        with open_shard(path, column) as reader:
            group_rows, nulls = reader.group_rows, reader.null_rows()
        return Footer(group_rows=group_rows, null_rows=nulls, digest=file_digest(path))
    except (pa.ArrowException, OSError, SystemError) as error:  # SystemError: a name that is no text
        raise ShardError(one_line(error)) from error


def open_shard(path: ShardPath, column: str) -> ShardReader:
    """A reader for the file's format; raises ShardError, OSError or pyarrow's exceptions."""
    if is_flat(path):
        return FlatReader(path, getattr(column, "vocab_size", None))
    with path.open("rb") as file:
        magic = file.read(8)
        head = magic + file.read(504)
    if what := foreign(head):
        raise ShardError(what)
    is_arrow = path.suffix == ".arrow" or magic.startswith(ARROW_FILE_MAGIC)
    return ArrowReader(path, column) if is_arrow else ParquetReader(path, column)
