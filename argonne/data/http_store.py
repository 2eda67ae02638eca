"""Ranges of files over HTTP, by the standard library: fsspec's own needs a package that few have."""

from __future__ import annotations

import fnmatch
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser

from argonne.data.retries import RemoteError

SOCKET_SECONDS = 20.0
"""How long a server may be silent."""
REQUEST_SECONDS = 120.0
"""How long one request may take in all."""
CHUNK_BYTES = 1 << 16
PASSING_STATUS = {408, 425, 429}
"""And 500 and above: worth asking again."""
MAGIC = re.compile(r"[*\[]")


class _Links(HTMLParser):
    """The targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


class HTTPStore:
    """A server that answers range requests; patterns need one that lists its folders as pages of links."""

    def glob(self, pattern: str) -> list[str]:
        """The URLs that match; ``*`` and ``[...]`` within one part of the path."""
        head, parts = pattern.split("/", 3)[:3], pattern.split("/", 3)[3:]
        if not parts or not MAGIC.search(parts[0]):
            return [pattern]
        if "**" in parts[0]:
            raise RemoteError("** is not for HTTP: name the folders")
        found = ["/".join(head)]
        steps = parts[0].split("/")
        for index, step in enumerate(steps):
            if not MAGIC.search(step):
                found = [f"{folder}/{step}" for folder in found]
                continue
            is_last = index == len(steps) - 1
            found = [url for folder in found for url in self._matching(folder, step, is_last)]
        return found

    def _matching(self, folder: str, step: str, is_last: bool) -> list[str]:
        """The files (of the last part) or folders in ``folder`` that match."""
        page = _Links()
        page.feed(self._get(f"{folder}/", None).decode(errors="replace"))
        matches = []
        for link in page.found:
            url = urllib.parse.urljoin(f"{folder}/", link)
            inside = url.partition("?")[0]
            if not inside.startswith(f"{folder}/") or inside.endswith("/") == is_last:
                continue
            name = inside[len(folder) + 1 :].rstrip("/")
            if "/" not in name and fnmatch.fnmatchcase(urllib.parse.unquote(name), step):
                matches.append(url.rstrip("/"))
        return sorted(set(matches))

    def info(self, url: str) -> tuple[int, str]:
        """(size in bytes, version or "") of a file."""
        try:
            with self._open(url, (0, 1)) as answer:
                total = self._total(answer)
                return total, answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        except _EmptyFileError:
            return 0, ""

    def read(self, url: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``."""
        return self._get(url, (start, end))

    @staticmethod
    def _total(answer: http.client.HTTPResponse) -> int:
        size = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
        if answer.status != 206 or not size.isdigit():
            raise RemoteError("the server does not answer range requests")
        return int(size)

    def _get(self, url: str, span: tuple[int, int] | None) -> bytes:
        deadline = time.monotonic() + REQUEST_SECONDS
        parts: list[bytes] = []
        with self._open(url, span) as answer:
            if span is not None:
                self._total(answer)
            while True:
                try:
                    part = answer.read(CHUNK_BYTES)
                except http.client.HTTPException as error:
                    raise ConnectionError(f"the answer was cut ({type(error).__name__})") from error
                if not part:
                    break
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a request took more than {REQUEST_SECONDS:g} s")
            content, promised = b"".join(parts), answer.headers.get("Content-Length")
        if promised is not None and len(content) != int(promised):
            raise ConnectionError(f"the answer was cut: {len(content)} of {promised} bytes")
        return content

    @staticmethod
    def _open(url: str, span: tuple[int, int] | None) -> http.client.HTTPResponse:
        request = urllib.request.Request(url)
        if span is not None:
            request.add_header("Range", f"bytes={span[0]}-{span[1] - 1}")
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=SOCKET_SECONDS)
            return answer
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and (error.headers.get("Content-Range") or "").endswith("*/0"):
                raise _EmptyFileError from error
            if error.code in (404, 410):
                raise RemoteError(f"it is not there (HTTP {error.code})") from error
            if error.code < 500 and error.code not in PASSING_STATUS:
                raise RemoteError(f"the server refused it: HTTP {error.code} {error.reason}") from error
            raise ConnectionError(f"HTTP {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise ConnectionError(str(error.reason)) from error
        except http.client.HTTPException as error:
            raise ConnectionError(f"no answer ({type(error).__name__})") from error
        except ValueError as error:  # a port or a host that is none
            raise RemoteError(str(error)) from error


class _EmptyFileError(Exception):
    """A file of 0 bytes has no range."""
