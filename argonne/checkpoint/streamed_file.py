"""A file, or a part of one, written once from front to back, past the page cache.

Buffered writes copy every byte into fresh pages of the kernel, which a large checkpoint never reads again and
for which it drops what was cached: memory bandwidth, system time, and then the disk still has to be waited
for. With ``O_DIRECT`` the disk takes the bytes from the process's own memory. It asks for aligned addresses
and sizes, so bytes go through a few aligned buffers; a thread writes one while the next is filled.

Where the file system knows no ``O_DIRECT`` (tmpfs, some network file systems) the same buffers are written
the usual way. Either way the bytes are durable only after the caller's fsync.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

BUFFER_BYTES = 4 << 20
BUFFERS = 3
_ALIGNMENT = 4096
"""Of addresses, sizes and positions: the largest that a disk in use asks for."""


class StreamedFile:
    """Writes bytes from ``start`` on to a descriptor that the caller owns (fsync and close included).

    OSError of a write is raised by a later call, at the latest by `finish`. The descriptor must stay open
    until `finish` or `abandon` has returned; as a context manager it abandons what was not finished.
    """

    def __init__(self, descriptor: int, start: int = 0) -> None:
        self._descriptor = descriptor
        self._direct = self._can_direct = _set_direct(descriptor, True)
        self._at = os.lseek(descriptor, start, os.SEEK_SET)
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE)) for _ in range(BUFFERS)]
        self._filled = 0
        self._room = BUFFER_BYTES - start % _ALIGNMENT  # after the first buffer all begin aligned
        self._writes: deque[Future[None]] = deque()
        self._failed = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self.position = start
        """Where the next byte goes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abandon()

    def append(self, data: memoryview | bytes) -> None:
        """Take over the bytes of ``data``, which may change once this has returned."""
        rest = memoryview(data)
        while rest:
            part = rest[: self._room - self._filled]
            self._buffers[0][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.position += len(part)
            rest = rest[len(part) :]
            if self._filled == self._room:
                self._write_buffer()

    def finish(self) -> None:
        """Wait until the kernel has every byte."""
        if self._filled:
            self._write_buffer()
        self._wait(0)
        self.abandon()
        self._direct = _set_direct(self._descriptor, False)

    def abandon(self) -> None:
        """Let the write under way end, drop the rest."""
        self._pool.shutdown(cancel_futures=True)

    def _write_buffer(self) -> None:
        full = self._buffers.pop(0)
        self._writes.append(self._pool.submit(self._write, full[: self._filled]))
        self._buffers.append(full)
        self._filled, self._room = 0, BUFFER_BYTES
        self._wait(len(self._buffers) - 1)

    def _wait(self, left: int) -> None:
        while len(self._writes) > left:
            self._writes.popleft().result()

    def _write(self, data: memoryview) -> None:
        while data and not self._failed:  # a failure is raised by the write that met it
            aligned = not (len(data) % _ALIGNMENT or self._at % _ALIGNMENT)
            if self._direct != (self._can_direct and aligned):  # both ends of what is written
                self._direct = _set_direct(self._descriptor, self._can_direct and aligned)
            try:
                count = os.write(self._descriptor, data)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    self._failed = True
                    raise
                self._can_direct = False  # a disk that asks for more than alignment
            else:
                self._at += count
                data = data[count:]


def is_direct(descriptor: int) -> bool:
    """Whether writes to the descriptor go past the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Switch ``O_DIRECT`` on or off; whether it is on now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    return is_direct(descriptor)
