"""Host memory without a name, taken with all its pages at once, that other processes of the node may see.

It is a memfd: gone with the last process that holds it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import socket
from dataclasses import dataclass

_TOKEN_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the memory of a process is found by the others of its node."""

    host: str
    pid: int
    descriptor: int
    size: int
    token: bytes
    """Its last bytes: the process of this number may be another's, in another container."""


class SharedMemory:
    """Memory of this process that others of its node may open; closed by the caller.

    ``room`` bytes at most: none is taken until `take`, and none may be touched before.

    Raises:
        OSError: no more files can be opened.
    """

    def __init__(self, room: int) -> None:
        token = os.urandom(_TOKEN_BYTES)
        self._descriptor = os.memfd_create("checkpoint")
        os.ftruncate(self._descriptor, room + len(token))
        self.memory = mmap.mmap(self._descriptor, room + len(token))
        self.memory[room:] = token
        self.place = Place(
            host=socket.gethostname(),
            pid=os.getpid(),
            descriptor=self._descriptor,
            size=len(self.memory),
            token=token,
        )

    def take(self, size: int) -> None:
        """Take the first ``size`` bytes. OSError where memory is short: a first touch would kill us."""
        if size:
            os.posix_fallocate(self._descriptor, 0, size)

    def close(self) -> None:
        """Let no other process open it; the memory goes with the last tensor that looks at it."""
        os.close(self._descriptor)


def open_place(place: Place) -> mmap.mmap | None:
    """The memory of another process of this host, as long as that lives; None where it is out of reach."""
    if place.host != socket.gethostname():
        return None
    try:
        descriptor = os.open(f"/proc/{place.pid}/fd/{place.descriptor}", os.O_RDWR)
        try:
            memory = mmap.mmap(descriptor, place.size)
        finally:
            os.close(descriptor)
    except (OSError, ValueError):  # not there, not ours, or not so long
        return None
    return memory if memory[-_TOKEN_BYTES:] == place.token else None
