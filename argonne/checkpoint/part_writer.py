"""One writer's part of a checkpoint file: its pieces in order, what stands between them, their checksums."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass

import torch

from argonne.checkpoint.archive import BLOCK_BYTES, tensor_bytes
from argonne.checkpoint.archive_layout import ArchiveLayout
from argonne.checkpoint.finite import require_finite
from argonne.checkpoint.pieces import Piece
from argonne.checkpoint.streamed_file import StreamedFile


@dataclass(kw_only=True)
class Run:
    """Neighbouring pieces of one tensor that one rank wrote."""

    index: int
    """Of the tensor."""
    begins: bool
    """The tensor begins with it."""
    size: int = 0
    crc: int = 0


class PartWriter:
    """Writes the pieces of one rank from the place of the first on, past the page cache.

    ``before``: records in front of the tensors, so tensor i is record ``before + i``. Between two tensors of
    its own it writes the headers too; the other gaps, and the checksum behind a tensor that another rank
    began, are left to rank 0.
    """

    def __init__(self, descriptor: int, layout: ArchiveLayout, before: int, first: Piece) -> None:
        self._layout, self._before = layout, before
        self._file = StreamedFile(descriptor, layout.starts[before + first.index] + first.offset)
        self.runs: list[Run] = []
        """In the order of the file."""

    def write(self, piece: Piece, values: torch.Tensor) -> None:
        """Append a piece: float32 on the CPU, contiguous. CheckpointError where a value is not finite."""
        if self.runs and self.runs[-1].index != piece.index:
            self._file.append(self._gap())
        if not self.runs or self.runs[-1].index != piece.index:
            self.runs.append(Run(index=piece.index, begins=piece.first == 0))
        run, data = self.runs[-1], tensor_bytes(values)
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            run.crc = zlib.crc32(block, run.crc)
            require_finite(torch.frombuffer(block, dtype=torch.float32), piece.entry.label)
            self._file.append(block)
        run.size += len(data)

    def _gap(self) -> bytes:
        run = self.runs[-1]
        self._layout.records[self._before + run.index].crc = run.crc  # of a whole tensor, or still unknown
        return self._layout.gap(self._before + run.index)

    def finish(self) -> None:
        """Wait until the kernel has every byte. OSError of any write."""
        self._file.finish()

    def abandon(self) -> None:
        """Write no more."""
        self._file.abandon()


def combined(runs: list[Run]) -> dict[int, int]:
    """The CRC-32 of each tensor from all ranks' runs, in the order of the file."""
    checksums: dict[int, int] = {}
    for run in runs:
        before = checksums.get(run.index)
        checksums[run.index] = run.crc if before is None else crc32_combine(before, run.crc, run.size)
    return checksums


def unwritten_gaps(parts: list[list[Run]], count: int) -> list[int]:
    """Tensors behind which no writer could put the right headers; the last of ``count`` is not among them."""
    written = {
        run.index
        for part in parts
        for run, follower in itertools.pairwise(part)
        if run.begins and follower.begins
    }
    return [index for index in range(count - 1) if index not in written]


# ----------------------------------------------------------------------------------------------------------
# The CRC-32 of bytes whose parts were read by different ranks


# A CRC is a polynomial over GF(2) modulo that of CRC-32, so appending n zero bytes multiplies by x^(8n): the
# CRC of A followed by B is crc(A) * x^(8 |B|) + crc(B), as zlib's own crc32_combine, which Python lacks.
_POLYNOMIAL = 0xEDB88320
"""Of CRC-32, lowest power in the highest bit."""
_ONE = 1 << 31


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    result = 0
    while a:
        if a & _ONE:
            result ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return result


def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the polynomial."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result


def crc32_combine(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of A followed by B, from those of A and B and the bytes of B."""
    return _product(first, _power_of_x(8 * second_size)) ^ second
