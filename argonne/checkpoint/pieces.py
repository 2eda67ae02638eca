"""The pieces of a checkpoint's tensors, and which rank writes which: neighbours, about as many bytes each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from argonne.checkpoint import rows
from argonne.checkpoint.contents import TensorEntry

_LEAST_BYTES = 4 << 20
_ROUND = 4
"""Pieces of each writer between two looks at how the others fare."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows ``first`` to ``last`` of tensor number ``index`` of the file."""

    index: int
    entry: TensorEntry
    first: int
    last: int
    writer: int
    """The rank that writes it."""

    @property
    def row_bytes(self) -> int:
        return 4 * math.prod(self.entry.shape[1:])

    @property
    def offset(self) -> int:
        """Of its first byte in the tensor."""
        return self.first * self.row_bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.last - self.first) * self.row_bytes

    @property
    def is_last(self) -> bool:
        """The tensor ends with it."""
        return self.last == self.entry.shape[0]


def plan_pieces(entries: Sequence[TensorEntry], writers: Sequence[int]) -> dict[int, list[Piece]]:
    """Rank -> the pieces that it writes, in the order of the file; the first ranks have the first pieces."""
    chunk_bytes = rows.CHUNK_BYTES
    if chunk_bytes > _LEAST_BYTES:  # all writers together hold about one chunk
        chunk_bytes = max(_LEAST_BYTES, chunk_bytes // len(writers))
    total = sum(4 * math.prod(entry.shape) for entry in entries)
    plan: dict[int, list[Piece]] = {writer: [] for writer in writers}
    done = 0
    for index, entry in enumerate(entries):
        for first, last in rows.row_chunks(entry.shape, chunk_bytes):
            writer = writers[min(len(writers) - 1, done * len(writers) // max(1, total))]
            piece = Piece(index=index, entry=entry, first=first, last=last, writer=writer)
            plan[writer].append(piece)
            done += piece.size
    return plan


def in_rounds(plan: dict[int, list[Piece]]) -> list[list[Piece]]:
    """All pieces in rounds of a few of each writer."""
    longest = max((len(pieces) for pieces in plan.values()), default=0)
    return [
        [piece for pieces in plan.values() for piece in pieces[start : start + _ROUND]]
        for start in range(0, longest, _ROUND)
    ]
