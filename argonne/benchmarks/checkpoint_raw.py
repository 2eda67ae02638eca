"""The raw disk: the same bytes written without any of what a checkpoint is."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from argonne.training.build import TrainedModel

RAW_BYTES = 16 << 20
DIRECT_BYTES = 4 << 20


def tensors_of(trained: TrainedModel) -> dict[str, torch.Tensor]:
    """Weights and Adam's state under flat names."""
    tensors = dict(trained.parameters())
    for name, state in trained.adam().items():
        tensors |= {f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return tensors


def raw_write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """The same bytes, one tensor after the other, in large writes, made durable."""
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors.values():
            data = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), RAW_BYTES):
                file.write(data[start : start + RAW_BYTES])
        os.fsync(file.fileno())


def raw_read(path: Path) -> None:
    """The whole file in large reads, into one buffer."""
    buffer = memoryview(bytearray(RAW_BYTES))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path) -> None:
    """Drop a durable file that no one has mapped from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def raw_direct_write(size: int, path: Path) -> None:
    """As many bytes, past the page cache from one aligned buffer, made durable: the disk's own limit.

    Raises OSError where the file system has no O_DIRECT.
    """
    buffer = memoryview(mmap.mmap(-1, DIRECT_BYTES))
    buffer[:] = os.urandom(DIRECT_BYTES)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        for start in range(0, size, DIRECT_BYTES):
            os.write(descriptor, buffer[: -(-min(DIRECT_BYTES, size - start) // 4096) * 4096])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
