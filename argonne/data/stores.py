"""The kinds of remote storage: fsspec's file systems, and HTTP."""

from __future__ import annotations

import errno
from typing import Any, Protocol

from argonne.data.http_store import HTTPStore
from argonne.errors import DataError, one_line

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
VERSION_KEYS = tuple("ETag etag md5Hash blob_id mtime LastModified last_modified updated created".split())
"""Where stores keep what changes with a file's content."""


class Store(Protocol):
    """One kind of remote storage. Errors are OSError, or those of its library."""

    def glob(self, pattern: str) -> list[str]:
        """The URLs of the files that match."""
        ...

    def info(self, url: str) -> tuple[int, str]:
        """(size in bytes, version or "") of a file, asked anew each time."""
        ...

    def read(self, url: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``."""
        ...


class FsspecStore:
    """Whatever fsspec knows: s3, gs, hf, memory and so on."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def glob(self, pattern: str) -> list[str]:
        """The URLs of the files that match."""
        return [str(self._files.unstrip_protocol(name)) for name in self._files.glob(pattern)]

    def info(self, url: str) -> tuple[int, str]:
        """(size in bytes, version or "") of a file."""
        found = self._files.info(url)
        if found.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        version = next((str(found[key]) for key in VERSION_KEYS if found.get(key)), "")
        return int(found["size"]), version

    def read(self, url: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``."""
        return bytes(self._files.cat_file(url, start=start, end=end))


def open_store(pattern: str) -> Store:
    """The store of a URL; DataError, naming the package, where it needs one that is not installed."""
    import fsspec

    protocol = pattern.partition("://")[0]
    if protocol in ("http", "https"):
        return HTTPStore()
    try:
        return FsspecStore(fsspec.filesystem(protocol, use_listings_cache=False))
    except ImportError as error:
        package = PACKAGES.get(protocol, f"that fsspec asks for ({one_line(error)})")
        raise DataError(
            f"{pattern} (--data-glob) needs the package {package}: pip install {PACKAGES.get(protocol, 'it')}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{pattern} (--data-glob): fsspec does not know {protocol}://: give a path or another URL"
        ) from error
    except Exception as error:
        # The library boundary: a store's package raises what it likes where credentials or settings lack.
        raise DataError(f"cannot open {pattern} (--data-glob): {one_line(error)}") from error
