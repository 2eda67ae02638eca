"""Where the ranks of a node put pieces of the file together: windows of shared host memory.

Every writer has one, with two halves. In each round all ranks put what they own of a piece at its place in
the writer's window; while that half is written, the other one is filled. They are not pinned: a disk is
slower than a GPU's copy to memory that is not, and to pin memory at every save takes time.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence

import torch

from argonne.checkpoint.pieces import Piece
from argonne.checkpoint.shared_memory import Place, SharedMemory, open_place
from argonne.errors import CheckpointError


class Windows:
    """This rank's window, and those of the node's other writers."""

    def __init__(self, rank: int, half_room: int) -> None:
        """``half_room``: bytes that a writer's pieces of a round take at most."""
        self._rank = rank
        self._own = SharedMemory(2 * half_room)
        self._memories: dict[int, mmap.mmap] = {rank: self._own.memory}
        self._halves: dict[int, int] = {}

    @property
    def place(self) -> Place:
        """Where the others find this rank's window."""
        return self._own.place

    def reach(self, places: Sequence[Place]) -> bool:
        """Open the windows of all ranks of rank 0's host; whether this rank is there and all were."""
        if places[self._rank].host != places[0].host:
            return False
        for rank, place in enumerate(places):
            if rank != self._rank and place.host == places[0].host:
                memory = open_place(place)
                if memory is None:
                    return False
                self._memories[rank] = memory
        return True

    def take(self, plan: Mapping[int, Sequence[Piece]], needed: bool) -> None:
        """Take memory for this rank's pieces of a ``plan`` (writer -> pieces), where any is ``needed``.

        CheckpointError where memory is short.
        """
        for writer, pieces in plan.items():
            self._halves[writer] = max((piece.place + piece.size for piece in pieces), default=0)
        size = 2 * self._halves.get(self._rank, 0)
        if not (needed and size):
            return
        try:
            self._own.take(size)
        except OSError as error:
            raise CheckpointError(
                f"rank {self._rank} cannot take {size:,} bytes of shared host memory ({error.strerror}): "
                "free some"
            ) from error

    def space(self, piece: Piece) -> torch.Tensor:
        """The place of a piece in its writer's window: float32, the shape of its rows."""
        shape = (piece.last - piece.first, *piece.entry.shape[1:])
        offset = piece.round % 2 * self._halves[piece.writer] + piece.place
        memory = self._memories[piece.writer]
        return torch.frombuffer(memory, dtype=torch.float32, count=math.prod(shape), offset=offset).view(
            shape
        )

    def close(self) -> None:
        """Let the windows go."""
        self._own.close()
