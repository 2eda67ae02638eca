"""A small HTTP server on the loopback interface that serves a folder in ranges, and fails as it is told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Faults:
    """What the server does wrong, and what it has been asked."""

    statuses: list[int] = field(default_factory=list)
    """Sent instead of the next answers, one each."""
    cut_after: int | None = None
    """Bytes of a body after which the connection closes."""
    cuts: int = 0
    """How many answers are cut."""
    stall_seconds: float = 0.0
    """Silence before each body."""
    ranges: bool = True
    """Whether range requests are answered as such."""
    served: dict[str, int] = field(default_factory=dict)
    """Bytes of bodies by path."""
    requests: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


def _handler(folder: Path, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            faults.requests += 1
            if faults.statuses:
                self.send_error(faults.statuses.pop(0))
                return
            path = folder / self.path.partition("?")[0].lstrip("/")
            if path.is_dir():
                links = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">x</a>' for p in path.iterdir())
                self._send(200, f"<html>{links}</html>".encode(), {})
            elif path.is_file():
                self._send_file(path)
            else:
                self.send_error(404)

        def _send_file(self, path: Path) -> None:
            content, asked = path.read_bytes(), self.headers.get("Range")
            headers = {"ETag": f'"{hash(content)}"'}
            if asked is None or not faults.ranges:
                self._send(200, content, headers)
                return
            start, end = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            end = min(end, len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self._send(206, content[start : end + 1], headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            faults.stop.wait(faults.stall_seconds)
            if faults.cut_after is not None and len(body) > faults.cut_after and faults.cuts:
                faults.cuts -= 1
                body = body[: faults.cut_after]
                self.close_connection = True
            name = self.path.rpartition("/")[2]
            faults.served[name] = faults.served.get(name, 0) + len(body)
            self.wfile.write(body)

    return Handler


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Faults]]:
    """(URL, faults) of a server of ``folder`` that stops at the end."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, faults))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        faults.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
