"""A folder of stored targets: what a teacher says of each sample of a stream, readable at any place at once.

``targets.json`` describes the others and says how many samples they are known to hold: it is replaced as a
whole after their bytes are on the disk, so that a writer that is cut off loses only what it had not vouched
for, and a second one goes on. ``samples.bin`` has an `ENTRY` for each sample, ``targets.bin`` a record of one
size: (block_size, k) ids, (block_size, k) log-probabilities, (block_size,) float32 logarithms of the rest's
mass. All are plain little-endian numbers, and every part carries a checksum. The files are read by ``pread``,
not mapped: one that is cut while it is read gives an error, and not SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from argonne.errors import DataError
from argonne.files import write_json_durably

FORMAT, VERSION = "argonne teacher targets", 1
ENTRY = np.dtype(
    [
        ("hash", "V16"),
        ("crc", "<u4"),
        ("source", "<i4"),
        ("epoch", "<i4"),
        ("file", "<i4"),
        ("row", "<i8"),
        ("token_offset", "<i8"),
        ("sample", "<i8"),
        ("check", "<u4"),
        ("unused", "<u4"),
    ]
)
"""Of one sample: the hash of its tokens, the CRC-32 of its record, where it begins (source by its number,
file by its number in the source's order, -1 in both for a place in a non-streaming epoch, whose sample is
given), and the CRC-32 of all that."""
_CHECKED = ENTRY.fields["check"][1]  # type: ignore[index]
REMAKE = "make them again (scripts/teacher_targets.py)"
MORE = "make more (scripts/teacher_targets.py goes on where it stopped; --samples says how many)"
WIDEST_SHORT_ID = 1 << 16


class Targets(NamedTuple):
    """What is stored of some samples, their tokens one after another."""

    ids: np.ndarray
    """(tokens, k) int32"""
    log_probs: np.ndarray
    """(tokens, k) float16 or float32"""
    log_rest: np.ndarray
    """(tokens,) float32; -inf where no token is left out."""


@dataclass(frozen=True, kw_only=True)
class TargetsForm:
    """What decides the size and the meaning of the records."""

    block_size: int
    vocab_size: int
    """Of the student, to which the teacher's logits are cut."""
    top_k: int
    temperature: float
    dtype: str
    """float16 or float32: of the log-probabilities."""
    document_attention: bool
    tokenizer: str
    """Its fingerprint."""
    teacher: str
    """Its fingerprint."""

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocab_size <= WIDEST_SHORT_ID else "<u4")

    @property
    def log_probs_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def token_bytes(self) -> int:
        """Of one token's targets."""
        return self.top_k * (self.ids_dtype.itemsize + self.log_probs_dtype.itemsize) + 4

    @property
    def record_bytes(self) -> int:
        """Of one sample's targets."""
        return self.block_size * self.token_bytes

    @property
    def sample_bytes(self) -> int:
        """Of all that is stored of one sample."""
        return self.record_bytes + ENTRY.itemsize

    def pack(self, targets: Targets) -> bytes:
        """One sample's record."""
        parts = (
            targets.ids.astype(self.ids_dtype),
            targets.log_probs.astype(self.log_probs_dtype),
            targets.log_rest.astype("<f4"),
        )
        return b"".join(part.tobytes() for part in parts)

    def unpack(self, record: bytes) -> Targets:
        """The inverse of `pack`."""
        size, count = (self.block_size, self.top_k), self.block_size * self.top_k
        ids = np.frombuffer(record, self.ids_dtype, count)
        after = count * self.ids_dtype.itemsize
        log_probs = np.frombuffer(record, self.log_probs_dtype, count, after)
        log_rest = np.frombuffer(record, "<f4", self.block_size, after + log_probs.nbytes)
        return Targets(ids.reshape(size).astype(np.int32), log_probs.reshape(size), log_rest)


def sample_hash(tokens: np.ndarray) -> bytes:
    """blake2b, 16 bytes, of a sample's block_size + 1 ids as little-endian int32."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype="<i4").tobytes(), digest_size=16).digest()


def checked(entries: np.ndarray) -> np.ndarray:
    """The entries with their own checksums set."""
    for entry in entries:
        entry["check"] = zlib.crc32(entry.tobytes()[:_CHECKED])
    return entries


@dataclass(frozen=True, kw_only=True)
class TargetsHeader:
    """``targets.json``."""

    form: TargetsForm
    first_sample: int
    """Number, since the run's step 0, of the first sample that is stored."""
    samples: int
    """Stored, and on the disk."""
    teacher_path: str
    files: Mapping[str, list[str]]
    """The shards of each source by its name, in the order that ``file`` counts; of the only one: ""."""
    mean_rest: float = 0.0
    """Mean over the tokens of the mass of the rest."""
    place: Mapping[str, Any] | None = None
    """Where the stream stands after the last sample: data_position and data_state as in a checkpoint."""

    @property
    def end(self) -> int:
        """Number of the first sample that is not stored."""
        return self.first_sample + self.samples

    @property
    def identity(self) -> str:
        """Short name of what is stored, whatever the number of samples."""
        text = json.dumps([asdict(self.form), self.first_sample], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class TargetsFolder:
    """The names of the files in a folder of stored targets, and its header."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.header, self.entries, self.records = (
            root / name for name in ("targets.json", "samples.bin", "targets.bin")
        )

    def write_header(self, header: TargetsHeader) -> None:
        """Durably, and as a whole; what it counts must be on the disk. Raises OSError."""
        document = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(header)}))
        write_json_durably(self.header, {**document, "checksum": _checksum(document)})

    def read_header(self) -> TargetsHeader:
        """Raises DataError where there is none, or one that is damaged or of another version."""
        if not self.header.is_file():
            what = f"has no {self.header.name}" if self.root.is_dir() else "is no folder"
            raise DataError(f"--teacher-targets {self.root} {what}: make it with scripts/teacher_targets.py")
        try:
            document = json.loads(self.header.read_text(encoding="utf-8"))
            if document["format"] != FORMAT or document["version"] != VERSION:
                raise DataError(
                    f"{self.header} is {document['format']} of version {document['version']}, and this suite "
                    f"reads version {VERSION} of {FORMAT}: {REMAKE}"
                )
            if document.pop("checksum") != _checksum(document):
                raise ValueError("its checksum is wrong")
            del document["format"], document["version"]
            return TargetsHeader(**{**document, "form": TargetsForm(**document["form"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.header} is damaged ({error}): copy the folder again, or {REMAKE}"
            ) from error


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class TargetsReader:
    """Reads stored targets at any sample; a read costs the same everywhere and keeps nothing in memory."""

    def __init__(self, folder: TargetsFolder) -> None:
        """DataError where the files are not there or are shorter than the header says."""
        self.folder, self.header = folder, folder.read_header()
        self._sizes = {folder.entries: ENTRY.itemsize, folder.records: self.header.form.record_bytes}
        self._open: dict[Path, int] = {}
        for path, size in self._sizes.items():
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
                there = os.fstat(self._open[path]).st_size
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read ({error.strerror}): restore it, or {REMAKE}"
                ) from error
            if there < self.header.samples * size:
                raise DataError(
                    f"{path} has {there} bytes, and targets.json counts {self.header.samples * size}: copy "
                    f"the folder again, or {REMAKE}"
                )

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _read(self, path: Path, first: int, count: int) -> bytes:
        size = self._sizes[path]
        offset, wanted = (first - self.header.first_sample) * size, count * size
        parts: list[bytes] = []
        try:
            while wanted:
                parts.append(os.pread(self._open[path], wanted, offset))
                if not parts[-1]:
                    raise DataError(f"{path} ends before sample {first + count - 1}: restore it, or {REMAKE}")
                offset, wanted = offset + len(parts[-1]), wanted - len(parts[-1])
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): mend the disk, or {REMAKE}"
            ) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_entries(self, first: int, count: int) -> np.ndarray:
        """(count,) of `ENTRY`, from sample ``first`` on. Raises DataError at a damaged one."""
        self._check_range(first, count)
        entries = np.frombuffer(self._read(self.folder.entries, first, count), ENTRY)
        for number, entry in enumerate(entries, first):
            if zlib.crc32(entry.tobytes()[:_CHECKED]) != entry["check"]:
                self._damaged(self.folder.entries, number)
        return entries

    def check(self, first: int, tokens: np.ndarray) -> None:
        """DataError naming the first of the samples (count, block_size + 1) that is not the stored one."""
        for number, entry, sample in zip(
            range(first, first + len(tokens)), self.read_entries(first, len(tokens)), tokens, strict=True
        ):
            found = sample_hash(sample)
            if found != entry["hash"].tobytes():
                raise DataError(
                    f"--teacher-targets {self.folder.root}: sample {number} was {self.place(entry)}, its "
                    f"tokens with the hash {entry['hash'].tobytes().hex()}, and the run's have {found.hex()}:"
                    " make targets for this run (scripts/teacher_targets.py with its flags), or restore its "
                    "data"
                )

    def read(self, first: int, count: int) -> Targets:
        """The targets of some samples. Raises DataError where their bytes are damaged."""
        form, entries = self.header.form, self.read_entries(first, count)
        parts = []
        for number, entry in enumerate(entries, first):
            record = self._read(self.folder.records, number, 1)
            if zlib.crc32(record) != entry["crc"]:
                self._damaged(self.folder.records, number)
            parts.append(form.unpack(record))
        if count == 1:
            return parts[0]
        return Targets(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def expect(self, first: int, count: int) -> None:
        """Some samples will be read soon: the kernel may fetch them."""
        count = min(count, self.header.end - first)
        if count > 0 and first >= self.header.first_sample:
            size = self.header.form.record_bytes
            offset = (first - self.header.first_sample) * size
            os.posix_fadvise(self._open[self.folder.records], offset, count * size, os.POSIX_FADV_WILLNEED)

    def place(self, entry: np.ndarray) -> str:
        """Where a sample begins, in words."""
        names = list(self.header.files)
        source = names[int(entry["source"])] if 0 <= entry["source"] < len(names) else ""
        said = f"of source {source!r} " if source else ""
        if entry["file"] < 0:
            return f"{said}sample {entry['sample']} of epoch {entry['epoch']}"
        files = self.header.files[source]
        file = files[int(entry["file"])] if entry["file"] < len(files) else f"file {entry['file']}"
        return f"{said}{file} row {entry['row']} token {entry['token_offset']}, epoch {entry['epoch']}"

    def _check_range(self, first: int, count: int) -> None:
        header = self.header
        if first < header.first_sample or first + count > header.end:
            missing = first if first < header.first_sample else max(first, header.end)
            raise DataError(
                f"--teacher-targets {self.folder.root} has the samples {header.first_sample} to "
                f"{header.end - 1}, and the run needs sample {missing}: {MORE}"
            )

    def _damaged(self, path: Path, number: int) -> None:
        raise DataError(f"{path} is damaged at sample {number}: copy the folder again, or {REMAKE}")
