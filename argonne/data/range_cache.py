"""Ranges of a remote file kept on disk, so that what was read once is not fetched again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

BLOCK_BYTES = 1 << 18


class RangeCache:
    """One version of one file: a sparse file of its blocks, and a byte for each that says it is there.

    A block is on the disk before its byte says so. A folder that cannot be written is no trouble: the ranges
    are then fetched each time.
    """

    def __init__(self, folder: Path, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._folder = folder
        self._size = size
        self._fetch = fetch
        self._blocks = -(-size // BLOCK_BYTES)
        self._usable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, length in (("data", size), ("there", self._blocks)):
                with open(folder / name, "ab") as file:
                    file.truncate(length)
            self._there = bytearray((folder / "there").read_bytes())
        except OSError:
            self._usable = False

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``; what ``fetch`` raises."""
        if not self._usable:
            return self._fetch(start, end)
        first, last = start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        try:
            missing = [block for block in range(first, last) if not self._there[block]]
            if missing:
                self._keep(missing[0], missing[-1] + 1)
            with open(self._folder / "data", "rb") as file:
                file.seek(start)
                content = file.read(end - start)
        except _CacheError:
            self._usable = False
            return self._fetch(start, end)
        except FileNotFoundError:  # somebody cleaned up
            self._usable = False
            return self._fetch(start, end)
        return content if len(content) == end - start else self._fetch(start, end)

    def _keep(self, first: int, last: int) -> None:
        """Fetch the blocks from ``first`` up to ``last`` and keep them."""
        start = first * BLOCK_BYTES
        content = self._fetch(start, min(last * BLOCK_BYTES, self._size))
        try:
            with open(self._folder / "data", "r+b") as file:
                file.seek(start)
                file.write(content)
                file.flush()
                os.fdatasync(file.fileno())
            with open(self._folder / "there", "r+b") as file:
                file.seek(first)
                file.write(b"\1" * (last - first))
        except OSError as error:
            raise _CacheError from error
        self._there[first:last] = b"\1" * (last - first)


class _CacheError(Exception):
    """The disk does not take it."""
