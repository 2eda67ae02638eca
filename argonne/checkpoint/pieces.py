"""The pieces of a checkpoint's tensors, and which rank writes which: neighbours, about as many bytes each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from argonne.checkpoint import rows
from argonne.checkpoint.contents import TensorEntry

_LEAST_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows ``first`` to ``last`` of tensor number ``index`` of the file."""

    index: int
    entry: TensorEntry
    first: int
    last: int
    writer: int
    """The rank that writes it."""
    round: int
    """When: all ranks do a round together."""
    place: int
    """Bytes of the writer's round in front of it."""

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


def round_room(entries: Sequence[TensorEntry]) -> int:
    """Bytes that the pieces of one writer's round have at most, whoever the writers are."""
    return max([rows.CHUNK_BYTES, *(4 * math.prod(entry.shape[1:]) for entry in entries)])


def plan_pieces(entries: Sequence[TensorEntry], writers: Sequence[int]) -> dict[int, list[Piece]]:
    """Rank -> the pieces that it writes, in the order of the file; the first ranks have the first pieces.

    A round is as many as fit into a chunk: 32 MiB of all writers together, or 4 MiB of each.
    """
    chunk_bytes = rows.CHUNK_BYTES
    if chunk_bytes > _LEAST_BYTES:
        chunk_bytes = max(_LEAST_BYTES, chunk_bytes // len(writers))
    total = sum(entry.size for entry in entries)
    plan: dict[int, list[Piece]] = {writer: [] for writer in writers}
    done = 0
    for index, entry in enumerate(entries):
        for first, last in rows.row_chunks(entry.shape, chunk_bytes):
            writer = writers[min(len(writers) - 1, done * len(writers) // max(1, total))]
            number, place = 0, 0
            if plan[writer]:
                before = plan[writer][-1]
                number, place = before.round, before.place + before.size
            size = (last - first) * 4 * math.prod(entry.shape[1:])
            if place + size > chunk_bytes and place:
                number, place = number + 1, 0
            piece = Piece(
                index=index, entry=entry, first=first, last=last, writer=writer, round=number, place=place
            )
            plan[writer].append(piece)
            done += size
    return plan


def in_rounds(plan: Mapping[int, Sequence[Piece]]) -> list[list[Piece]]:
    """All pieces, round by round."""
    pieces = [piece for part in plan.values() for piece in part]
    rounds: list[list[Piece]] = [[] for _ in range(max((piece.round + 1 for piece in pieces), default=0))]
    for piece in pieces:
        rounds[piece.round].append(piece)
    return rounds
