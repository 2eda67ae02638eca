"""Host memory without a name: taken with all its pages at once, seen by other processes of the node, pinned.

It is a memfd: gone with the last process that holds it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import socket
from dataclasses import dataclass

import torch

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


def pin(memory: mmap.mmap, size: int) -> bool:
    """Let the GPU write to the first ``size`` bytes by itself; whether CUDA agreed."""
    if not size:
        return True
    runtime = torch.cuda.cudart()
    return bool(runtime.cudaHostRegister(_address(memory), size, 0) == runtime.cudaError.success)


def unpin(memory: mmap.mmap) -> None:
    """Undo `pin`, before the memory is let go."""
    torch.cuda.cudart().cudaHostUnregister(_address(memory))


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
