"""Bytes of one checkpoint file: a streaming writer, and what proves a file whole.

The file is a stored (uncompressed) zip archive in the layout of ``torch.save``: ``archive/data.pkl``,
``archive/byteorder``, ``archive/data/0`` ... Every record starts at a multiple of 64 bytes, so that
``torch.load(mmap=True)`` and our reader use the bytes in place. Each record is followed by its CRC-32
(a "data descriptor", as torch writes), so the file is written once from front to back, and a tensor's bytes
are read from memory once for all three: the checksum, the check for finite values, and the copy to the disk.

What proves the bytes: the CRC-32 of every record, and in the archive comment
(``tensor-parallel-checkpoint sha256:<hex>``) the SHA-256 of all other bytes of the file: headers, padding,
directory and the comment itself up to the digest. So any flipped bit and any truncation is found.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from argonne.checkpoint.finite import require_finite
from argonne.checkpoint.streamed_file import StreamedFile
from argonne.errors import CheckpointError, one_line

ALIGNMENT = 64
COMMENT_PREFIX = b"tensor-parallel-checkpoint sha256:"
ARCHIVE = "archive"
_DIGEST_HEX = 64
BLOCK_BYTES = 1 << 20
"""What a core's own cache holds: a block is read from memory once for all that is done with it."""
_HASH_BYTES = 1 << 20
_ZIP64_LIMIT = 0xFFFFFFFF
_CRC_FOLLOWS = 8  # flag: sizes and CRC-32 stand behind the data
_DOS_DATE = 0x21  # 1980-01-01: a checkpoint's bytes do not depend on the clock


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass
class Record:
    """One entry of the archive, as its headers tell it."""

    name: bytes
    size: int
    header_offset: int
    values: str | None = None
    crc: int = 0


class ArchiveWriter:
    """Writes records in order to a file descriptor opened for writing at position 0.

    ``begin`` announces a record and its size, ``write`` takes its bytes in pieces, ``close`` writes the
    directory and the digest. The caller owns the descriptor, fsync and close included.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = StreamedFile(descriptor)
        self._records: list[Record] = []
        self._remaining = 0
        self._digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> None:
        """Write one whole record."""
        self.begin(name, len(data))
        self.write(memoryview(data))

    def begin(self, name: str, size: int, values: str | None = None) -> None:
        """Start the record ``archive/<name>`` of ``size`` bytes.

        ``values`` says that they are float32 numbers, and what to call them where one is not finite.
        """
        self._end_record()
        encoded = f"{ARCHIVE}/{name}".encode()
        position = self._file.position
        self._records.append(Record(encoded, size, position, values))
        self._put(local_header(encoded, size, position))
        self._remaining = size

    def write(self, data: memoryview) -> None:
        """Append bytes to the current record.

        Raises CheckpointError where the record's values are to be finite and one is not.
        """
        if len(data) > self._remaining:
            raise ValueError("more bytes than the record announced")
        self._remaining -= len(data)
        record = self._records[-1]
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            record.crc = zlib.crc32(block, record.crc)
            if record.values is not None:
                require_finite(torch.frombuffer(block, dtype=torch.float32), record.values)
            self._file.append(block)

    def close(self) -> int:
        """Write directory, end records and digest; return the size of the file in bytes."""
        self._end_record()
        start = self._file.position
        directory = b"".join(directory_entry(record) for record in self._records)
        self._put(directory + end_records(len(self._records), len(directory), start) + COMMENT_PREFIX)
        self._file.append(self._digest.hexdigest().encode())
        self._file.finish()
        return self._file.position

    def abandon(self) -> None:
        """Stop writing."""
        self._file.abandon()

    def _end_record(self) -> None:
        if self._remaining:
            raise ValueError("fewer bytes than the record announced")
        if self._records:
            self._put(data_descriptor(self._records[-1]))

    def _put(self, data: bytes) -> None:
        """Append what lies outside the records."""
        self._digest.update(data)
        self._file.append(data)


def _shown(number: int) -> int:
    """What a 32-bit field says: the number, or that it stands in a 64-bit field."""
    return number if number < _ZIP64_LIMIT else 0xFFFFFFFF


def local_header(name: bytes, size: int, offset: int) -> bytes:
    """What stands before a record that begins at ``offset``; its bytes begin at a multiple of 64."""
    extra = struct.pack("<HHQQ", 1, 16, 0, 0) if size >= _ZIP64_LIMIT else b""
    start = offset + 30 + len(name) + len(extra) + 4
    padding = -start % ALIGNMENT
    extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # torch's own padding field, "FB"
    version = 45 if size >= _ZIP64_LIMIT else 20
    return (
        struct.pack(
            "<4s5H3L2H", b"PK\3\4", version, _CRC_FOLLOWS, 0, 0, _DOS_DATE, 0, 0, 0, len(name), len(extra),
        )
        + name
        + extra
    )  # fmt: skip


def data_descriptor(record: Record) -> bytes:
    """What stands behind a record: its CRC-32 and size."""
    sizes = "2Q" if record.size >= _ZIP64_LIMIT else "2L"
    return struct.pack(f"<4sL{sizes}", b"PK\7\x08", record.crc, record.size, record.size)


def directory_entry(record: Record) -> bytes:
    """A record's entry in the directory."""
    large = [number for number in (record.size, record.size) if record.size >= _ZIP64_LIMIT]
    if record.header_offset >= _ZIP64_LIMIT:
        large.append(record.header_offset)
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    version = 45 if large else 20
    shown = _shown(record.size)
    return (
        struct.pack(
            "<4s4B4H3L5H2L", b"PK\1\2", version, 0, version, 0, _CRC_FOLLOWS, 0, 0, _DOS_DATE, record.crc,
            shown, shown, len(record.name), len(extra), 0, 0, 0, 0, _shown(record.header_offset),
        )
        + record.name
        + extra
    )  # fmt: skip


def end_records(count: int, size: int, start: int) -> bytes:
    """What ends the directory of ``count`` entries and ``size`` bytes at ``start``, up to the comment."""
    end64 = b""
    if start + size >= _ZIP64_LIMIT or count >= 0xFFFF:
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        end64 += struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
    shown = min(count, 0xFFFF)
    comment = len(COMMENT_PREFIX) + _DIGEST_HEX
    return end64 + struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, shown, shown, _shown(size), _shown(start), comment
    )


@dataclass(frozen=True)
class RecordSpan:
    """Where the bytes of a record lie in the file."""

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class ArchiveIndex:
    """Records of a zip file by name without the archive's prefix; ``sealed`` when it carries our digest."""

    records: dict[str, RecordSpan]
    size: int
    sealed: bool
    has_checksums: bool


def read_archive_index(path: Path) -> ArchiveIndex:
    """Read the directory of a zip file and check that its records are disjoint runs inside the file.

    Raises CheckpointError (without the path) for anything a ``torch.save`` or this module did not write.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos, comment, directory = archive.infolist(), archive.comment, archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError) as error:
        raise CheckpointError(f"{size} bytes, cut or damaged ({one_line(error)[:100]})") from error
    prefixes = {info.filename.split("/", 1)[0] for info in infos}
    if len(prefixes) != 1 or not infos:
        raise CheckpointError("not a torch checkpoint (no single archive folder)")
    spans = []
    with path.open("rb") as file:
        for info in infos:
            spans.append(_span(info, file.fileno(), directory))
    position = 0
    for span in sorted(spans, key=lambda span: span.offset):
        if span.offset < position:
            raise CheckpointError(f"records overlap at {span.name!r}"[:200])
        position = span.offset + span.size
    prefix = prefixes.pop() + "/"
    records = {span.name.removeprefix(prefix): span for span in spans}
    if len(records) != len(spans):
        raise CheckpointError("two records have the same name")
    if "data.pkl" not in records:
        raise CheckpointError("not a torch checkpoint (no data.pkl)")
    has_checksums = any(span.crc for span in spans)
    return ArchiveIndex(records, size, comment.startswith(COMMENT_PREFIX), has_checksums)


def _span(info: zipfile.ZipInfo, descriptor: int, directory: int) -> RecordSpan:
    name = info.filename
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name:
        raise CheckpointError(f"record name {name!r} leaves the archive"[:200])
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise CheckpointError(f"record {name!r} is compressed or encrypted"[:200])
    if info.header_offset < 0:
        raise CheckpointError(f"record {name!r} lies outside the file"[:200])
    header = os.pread(descriptor, 30, info.header_offset)
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise CheckpointError(f"record {name!r} has no header"[:200])
    name_length, extra_length = struct.unpack("<2H", header[26:30])
    offset = info.header_offset + 30 + name_length + extra_length
    if offset + info.file_size > directory:
        raise CheckpointError(f"record {name!r} reaches beyond the data"[:200])
    return RecordSpan(name, offset, info.file_size, info.CRC)


def verify_structure(path: Path) -> ArchiveIndex:
    """Prove every byte of a sealed file that lies outside its records; return its index."""
    index = read_archive_index(path)
    if not index.sealed:
        return index
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start, stop in _outside(index):
            for position in range(start, stop, _HASH_BYTES):
                digest.update(os.pread(file.fileno(), min(_HASH_BYTES, stop - position), position))
        sealed = os.pread(file.fileno(), _DIGEST_HEX, index.size - _DIGEST_HEX)
    if digest.hexdigest().encode() != sealed:
        raise CheckpointError("its directory or headers do not match their SHA-256")
    return index


def _outside(index: ArchiveIndex) -> Iterator[tuple[int, int]]:
    position = 0
    for span in sorted(index.records.values(), key=lambda span: span.offset):
        yield position, span.offset
        position = span.offset + span.size
    yield position, index.size - _DIGEST_HEX


def verify_archive(path: Path, *, threads: int = 0, from_disk: bool = False) -> ArchiveIndex:
    """Read the whole file back and prove every byte; return its index.

    ``from_disk`` drops the file from the page cache first, so that what is read is what the disk holds.
    Raises CheckpointError (without the path) naming the first record that does not match, OSError where
    the disk fails.
    """
    index = verify_structure(path)
    if not index.has_checksums:
        return index
    workers = threads or min(8, os.cpu_count() or 1)
    pieces = sorted(index.records.values(), key=lambda span: -span.size)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if from_disk:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="verify") as pool:
            checksums = list(pool.map(lambda span: _crc(descriptor, span), pieces))
    finally:
        os.close(descriptor)
    for span, checksum in zip(pieces, checksums, strict=True):
        if checksum != span.crc:
            raise CheckpointError(f"record {span.name} does not match its checksum")
    return index


def _crc(descriptor: int, span: RecordSpan) -> int:
    buffer = bytearray(min(span.size, 4 << 20))
    crc, done = 0, 0
    while done < span.size:
        view = memoryview(buffer)[: min(len(buffer), span.size - done)]
        count = os.preadv(descriptor, [view], span.offset + done)
        if count == 0:
            raise CheckpointError(f"ends inside record {span.name}")
        crc = zlib.crc32(view[:count], crc)
        done += count
    return crc
