"""Where every byte of an archive lies, known before one is written: for several writers of one file.

The same bytes as :class:`~argonne.checkpoint.archive.ArchiveWriter` writes from front to back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from argonne.checkpoint.archive import (
    ARCHIVE,
    COMMENT_PREFIX,
    Record,
    data_descriptor,
    directory_entry,
    end_records,
    local_header,
)


class ArchiveLayout:
    """Positions from the names and sizes of the records, in order; headers once their ``crc`` is set."""

    def __init__(self, records: Sequence[tuple[str, int]]) -> None:
        self.records: list[Record] = []
        self.starts: list[int] = []
        """Position of each record's first byte, its header behind it."""
        position = 0
        for name, size in records:
            record = Record(f"{ARCHIVE}/{name}".encode(), size, position)
            self.records.append(record)
            self.starts.append(position + len(local_header(record.name, size, position)))
            position = self.starts[-1] + size + len(data_descriptor(record))
        self._end = position

    def end_of(self, index: int) -> int:
        """Where the gap behind record ``index`` begins."""
        return self.starts[index] + self.records[index].size

    def gap(self, index: int) -> bytes:
        """What stands between record ``index`` and the next: its descriptor, the next one's header.

        ``index`` -1: what stands before the first record.
        """
        before = data_descriptor(self.records[index]) if index >= 0 else b""
        if index + 1 == len(self.records):
            return before
        follower = self.records[index + 1]
        return before + local_header(follower.name, follower.size, follower.header_offset)

    def closing(self) -> bytes:
        """What stands behind the last record's descriptor; every ``crc`` must be set."""
        directory = b"".join(directory_entry(record) for record in self.records)
        ending = end_records(len(self.records), len(directory), self._end)
        told = directory + ending + COMMENT_PREFIX
        digest = hashlib.sha256()
        for part in (*self._gaps(), told):
            digest.update(part)
        return told + digest.hexdigest().encode()

    def _gaps(self) -> Iterator[bytes]:
        for index in range(-1, len(self.records)):
            yield self.gap(index)
