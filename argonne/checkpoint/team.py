"""Who takes part in a save, and how a piece of the file comes to the rank that writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from argonne.checkpoint.contents import Adam, tensor_entries
from argonne.checkpoint.meeting import Meeting
from argonne.checkpoint.pieces import Piece, plan_pieces, round_room
from argonne.checkpoint.rows import clip_rows, local_part
from argonne.checkpoint.transfer import SlicePeers, message_numel, pack_message
from argonne.checkpoint.window import Windows
from argonne.tp.slices import Rectangle, SliceMap


class Team:
    """The ranks of a save. ``near`` ones, after `meet`, share memory and write rank 0's file."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        adam: Adam,
        slice_map: SliceMap,
        rank: int,
        peers: SlicePeers,
        meeting: Meeting,
    ) -> None:
        self.adam, self.rank, self.meeting = adam, rank, meeting
        shapes = {name: slice_map.shape(name) for name in slice_map.names}
        self.entries = tensor_entries(shapes, with_adam=bool(adam))
        self._parameters, self._slice_map, self._peers = parameters, slice_map, peers
        self._owned: dict[tuple[str, int], Sequence[Rectangle]] = {}
        self._windows = Windows(rank, round_room(self.entries))
        self.descriptor: int | None = None
        """Of rank 0's file, where another rank has it open."""
        self.near: list[int] = [0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._windows.close()
        if self.descriptor is not None:
            os.close(self.descriptor)

    # ---------------------------------------------------------------- who

    def meet(self, told: Any) -> Any:
        """Learn where all windows are and what rank 0 ``told`` (a path and more); collective.

        Ranks that cannot see a window of their own host, or not open the file, send their slices as those of
        other nodes do.
        """
        heard = self.meeting.gather((self._windows.place, told))
        path, _ = heard[0][1]
        reached = self._windows.reach([place for place, _ in heard]) and self._open(path)
        answers = self.meeting.gather(reached)
        if answers[0]:
            self.near = [rank for rank, answer in enumerate(answers) if answer]
        return heard[0][1]

    def _open(self, path: str) -> bool:
        if self.rank != 0:
            try:
                self.descriptor = os.open(path, os.O_RDWR)
            except OSError:
                return False
        return True

    def plan(self) -> dict[int, list[Piece]]:
        """Who writes what, with memory taken for it; collective."""
        plan = plan_pieces(self.entries, self.near)
        mine = plan.get(self.rank, [])
        self._windows.take(plan, needed=any(self._as_it_is(piece) is None for piece in mine))
        self.meeting.gather(None)
        return plan

    # ---------------------------------------------------------------- what

    def put(self, pieces: Sequence[Piece]) -> None:
        """Put what this rank owns of a round's pieces into the windows of those who write them."""
        for piece in pieces:
            if piece.writer == self.rank and self._as_it_is(piece) is not None:
                continue
            owned = list(self._places(piece, self.rank))
            if owned:
                local, space = self._local(piece), self._windows.space(piece)
                for place, box, low, high in owned:
                    space[place].copy_(local_part(local, box, low, high))

    def send(self, pieces: Sequence[Piece]) -> None:
        """Send what this rank owns of these pieces to those who write them."""
        sending = []
        for piece in pieces:
            boxes = self._boxes(piece, self.rank)
            message = pack_message(self._local(piece), boxes, piece.first, piece.last)
            if message is not None:
                sending.append((piece.writer, message, self._peers.send(message, piece.writer)))
        for writer, _, work in sending:
            self._peers.wait(work, writer)

    def assembled(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each of this rank's pieces whole, float32 on the CPU, valid in its round. All must be taken."""
        arriving = [self._receive(piece) for piece in pieces]
        for piece, arrivals in zip(pieces, arriving, strict=True):
            whole = self._as_it_is(piece)
            if whole is None:
                whole = self._windows.space(piece)
            for rank, buffer, work in arrivals:
                self._peers.wait(work, rank)
                for place, *_ in self._places(piece, rank):
                    target = whole[place]
                    target.copy_(buffer[: target.numel()].view(target.shape))
                    buffer = buffer[target.numel() :]
            yield piece, whole

    def _as_it_is(self, piece: Piece) -> torch.Tensor | None:
        """This rank's own memory of a piece where that can be written as it is."""
        clipped = clip_rows(self._boxes(piece, self.rank), piece.first, piece.last)
        local = self._local(piece)
        if len(clipped) != 1 or local.device.type != "cpu" or local.dtype != torch.float32:
            return None
        part = local_part(local, *clipped[0])
        shape = (piece.last - piece.first, *piece.entry.shape[1:])
        return part if part.shape == shape and part.is_contiguous() else None

    def _receive(self, piece: Piece) -> list[tuple[int, torch.Tensor, Any]]:
        """Start receiving what ranks that share no memory with this one own of a piece."""
        arriving = []
        for rank in range(self._slice_map.world_size):
            if rank not in self.near:
                count = message_numel(self._boxes(piece, rank), (piece.first, piece.last))
                if count:
                    buffer = torch.empty(count, dtype=torch.float32)
                    arriving.append((rank, buffer, self._peers.receive(buffer, rank)))
        return arriving

    def _local(self, piece: Piece) -> torch.Tensor:
        return piece.entry.local(self._parameters, self.adam)

    def _boxes(self, piece: Piece, rank: int) -> Sequence[Rectangle]:
        key = (piece.entry.name, rank)
        if key not in self._owned:
            self._owned[key] = self._slice_map.owned(*key)
        return self._owned[key]

    def _places(self, piece: Piece, rank: int) -> Iterator[tuple[tuple[slice, ...], Rectangle, int, int]]:
        """What a rank owns of a piece: where in the piece it goes, and the rows of which box."""
        for box, low, high in clip_rows(self._boxes(piece, rank), piece.first, piece.last):
            yield (slice(low - piece.first, high - piece.first), *box.unsharded_index[1:]), box, low, high
