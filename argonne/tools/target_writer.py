"""Write a folder of stored targets: records by every rank, entries and header by rank 0."""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from argonne.data.position import DataPosition
from argonne.data.target_file import ENTRY, Targets, TargetsFolder, TargetsHeader, checked, sample_hash
from argonne.errors import ConfigError, DataError
from argonne.tools.preflight_inputs import nearest_folder

FLAG = "--targets"


class SamplePlace(NamedTuple):
    """Where a sample begins."""

    source: int
    """Its number in a mixture; 0 without one."""
    position: DataPosition


def refuse_others(folder: TargetsFolder, there: TargetsHeader, asked: TargetsHeader) -> None:
    """ConfigError at the first thing in which the targets that are there are not those asked for."""
    now, before = asdict(asked.form), asdict(there.form)
    for key, value in before.items():
        if now[key] != value:
            raise ConfigError(
                f"{FLAG} {folder.root} holds other targets: {key.replace('_', ' ')} is {value} there, and "
                f"{now[key]} is asked for: name another folder, or ask for the same"
            )


def require_room(folder: Path, needed: int) -> None:
    """DataError where the disk has no room for so many bytes more."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        raise DataError(
            f"{FLAG} {folder} needs {needed:,} bytes more, and {free:,} are free: lower --samples or "
            "--top-k, or name a folder on another disk"
        )


class TargetsWriter:
    """One rank's hands on the files. Records and entries are written in place, by the sample's number."""

    def __init__(self, folder: TargetsFolder, header: TargetsHeader, *, owner: bool) -> None:
        """``owner``: of rank 0, which makes the files and cuts off what no header has vouched for. DataError
        where the folder cannot be written, or is being written."""
        self._folder, self.header = folder, header
        self._sizes = {folder.entries: ENTRY.itemsize, folder.records: header.form.record_bytes}
        try:
            folder.root.mkdir(parents=True, exist_ok=True)
            self._open = {path: os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in self._sizes}
            if owner:
                fcntl.flock(self._open[folder.entries], fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path, size in self._sizes.items():
                    os.ftruncate(self._open[path], header.samples * size)
        except BlockingIOError:
            raise DataError(
                f"{FLAG} {folder.root} is being written by another process: wait, or name another folder"
            ) from None
        except OSError as error:
            raise self._fault(error) from error

    def write_record(self, number: int, targets: Targets) -> int:
        """One sample's targets; its CRC-32, for the entry."""
        record = self.header.form.pack(targets)
        self._write(self._folder.records, number, record)
        return zlib.crc32(record)

    def write_entries(
        self, first: int, tokens: np.ndarray, crcs: Sequence[int], places: Sequence[SamplePlace]
    ) -> None:
        """Of samples (count, block_size + 1) from number ``first`` on."""
        entries = np.zeros(len(tokens), ENTRY)
        for entry, sample, crc, (source, position) in zip(entries, tokens, crcs, places, strict=True):
            entry["hash"], entry["crc"], entry["source"] = np.void(sample_hash(sample)), crc, source
            entry["epoch"] = position.epoch
            if position.sample is not None:
                entry["file"], entry["sample"] = -1, position.sample
            else:
                entry["file"], entry["row"] = position.file_index, position.row
                entry["token_offset"] = position.token_offset
        self._write(self._folder.entries, first, checked(entries).tobytes())

    def commit(self, header: TargetsHeader) -> None:
        """Vouch for what the header counts, once it is on the disk; of rank 0, for the ranks of its host."""
        try:
            for descriptor in self._open.values():
                os.fsync(descriptor)
            self._folder.write_header(header)
        except OSError as error:
            raise self._fault(error) from error
        self.header = header

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)

    def _write(self, path: Path, number: int, data: bytes) -> None:
        offset, left = (number - self.header.first_sample) * self._sizes[path], memoryview(data)
        try:
            while left:
                count = os.pwrite(self._open[path], left, offset)
                offset, left = offset + count, left[count:]
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> DataError:
        return DataError(
            f"{FLAG} {self._folder.root} cannot be written ({error.strerror}): free space or mend its "
            "permissions, and start again: it goes on where it stopped"
        )
