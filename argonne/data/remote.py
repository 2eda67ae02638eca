"""Shards at URLs, as paths and files that the readers use like local ones.

A remote shard is read in ranges, so that its footer and the row groups that are used are all that travels.
``http(s)://`` is read by `http_store`, every other protocol through fsspec.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from argonne.data.range_cache import RangeCache
from argonne.data.retries import RemoteError, with_retries
from argonne.data.stores import Store, open_store
from argonne.errors import DataError


@dataclass(frozen=True)
class RemoteStatus:
    """The part of os.stat_result that the readers use."""

    st_size: int
    st_mtime_ns: int
    """A number that changes with the file's version (its ETag or time); 0 where the store tells none."""


def is_url(pattern: str) -> bool:
    """Whether a data glob is a URL."""
    return "://" in pattern


class RemotePath:
    """The place of a remote shard, with the part of pathlib.Path that the readers use."""

    def __init__(self, url: str, store: Store, cache: Path | None = None) -> None:
        self._url = url
        self._store = store
        self._cache = cache
        """Folder that keeps what was read."""

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __fspath__(self) -> str:
        return self._url

    @property
    def name(self) -> str:
        """The last part of the URL, without a query."""
        path = self._url.partition("?")[0] if self._url.startswith("http") else self._url
        return path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's ending."""
        return Path(self.name).suffix

    @property
    def parent(self) -> str:
        """The URL up to the name."""
        return self._url.rpartition("/")[0]

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def stat(self) -> RemoteStatus:
        """Size and version, asked anew; RemoteError."""
        size, version = with_retries(lambda: self._store.info(self._url))
        digest = hashlib.blake2b(version.encode(), digest_size=7).digest()
        return RemoteStatus(size, int.from_bytes(digest, "big") if version else 0)

    def open(self, mode: str = "rb") -> RemoteFile:
        """Open for reading in ranges; RemoteError."""
        assert mode == "rb"
        status = self.stat()
        fetch: Callable[[int, int], bytes] = self._fetch
        if self._cache is not None:
            content = f"{self._url}\0{status.st_size}\0{status.st_mtime_ns}"
            key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
            fetch = RangeCache(self._cache / "remote" / key, status.st_size, self._fetch).read
        return RemoteFile(status.st_size, fetch)

    def _fetch(self, start: int, end: int) -> bytes:
        def request() -> bytes:
            content = self._store.read(self._url, start, end)
            if len(content) != end - start:
                raise EOFError(f"it was cut: {len(content)} of {end - start} bytes from {start} on")
            return content

        return with_retries(request)


ShardPath: TypeAlias = Path | RemotePath


class RemoteFile(io.RawIOBase):
    """A remote shard open for reading, each read a range of it."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._fetch = fetch
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``size`` bytes (all that are left: -1); RemoteError."""
        left = max(0, self._size - self._place)
        count = left if size is None or size < 0 else min(size, left)
        content = self._fetch(self._place, self._place + count) if count else b""
        self._place += count
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def find_remote(pattern: str, cache: Path | None = None) -> list[RemotePath]:
    """The shards that a URL or a pattern of URLs names; DataError where the store cannot be asked."""
    store = open_store(pattern)
    try:
        found = with_retries(lambda: store.glob(pattern))
    except RemoteError as error:
        raise DataError(
            f"cannot list {pattern} (--data-glob): {error}: check the URL and the network"
        ) from error
    return [RemotePath(url, store, cache) for url in found]
