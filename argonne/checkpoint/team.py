"""Who takes part in a save from copies, and how a piece of the file comes to the rank that writes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from argonne.checkpoint.contents import Adam, tensor_entries
from argonne.checkpoint.host_copy import HostCopy, Place
from argonne.checkpoint.meeting import Meeting
from argonne.checkpoint.pieces import Piece
from argonne.checkpoint.rows import clip_rows, local_part
from argonne.checkpoint.transfer import SlicePeers, message_numel, pack_message
from argonne.tp.slices import Rectangle, SliceMap

Copies = tuple[dict[str, torch.Tensor], Adam]
"""Weights and Adam's moments as a rank's copy holds them."""


class Team:
    """The ranks of a save. ``near`` ones, after `meet`, see each other's copies and write rank 0's file."""

    def __init__(
        self,
        copy: HostCopy,
        slice_map: SliceMap,
        rank: int,
        group: dist.ProcessGroup | None,
        meeting: Meeting,
    ) -> None:
        self.copy, self.rank, self.meeting = copy, rank, meeting
        shapes = {name: slice_map.shape(name) for name in slice_map.names}
        self.entries = tensor_entries(shapes, with_adam=bool(copy.adam))
        self._slice_map = slice_map
        self._peers = SlicePeers((), group)
        self._owned: dict[tuple[str, int], Sequence[Rectangle]] = {}
        self._copies: dict[int, Copies] = {rank: (copy.parameters, copy.adam)}
        self._descriptor: int | None = None
        self.near: list[int] = [0]

    # ---------------------------------------------------------------- who

    def meet(self, told: Any) -> Any:
        """Learn where all copies are and what rank 0 ``told`` (a path and more); collective.

        Ranks that cannot see a copy of their own host, or not open the file, send their slices as those of
        other nodes do.
        """
        heard = self.meeting.gather((self.copy.place, told))
        places: list[Place] = [place for place, _ in heard]
        path, _ = heard[0][1]
        reached = self._reach(places) and self._open(path)
        answers = self.meeting.gather(reached)
        if answers[0]:
            self.near = [rank for rank, answer in enumerate(answers) if answer]
        return heard[0][1]

    def _reach(self, places: Sequence[Place]) -> bool:
        """Look at the copies of this rank's host; whether that is rank 0's and all were there."""
        if places[self.rank].host != places[0].host:
            return False
        for rank, place in enumerate(places):
            if rank != self.rank and place.host == places[0].host:
                found = self.copy.peer(place, self._slice_map, rank)
                if found is None:
                    return False
                self._copies[rank] = found
        return True

    def _open(self, path: str) -> bool:
        if self.rank != 0:
            try:
                self._descriptor = os.open(path, os.O_RDWR)
            except OSError:
                return False
        return True

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[int | None]:
        """The descriptor of rank 0's file where this rank has it open; closed at the end."""
        try:
            yield self._descriptor if self.rank in self.near else None
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    # ---------------------------------------------------------------- what

    def send(self, pieces: Sequence[Piece]) -> None:
        """Send what this rank owns of these pieces to those who write them."""
        sending = []
        for piece in pieces:
            local = piece.entry.local(self.copy.parameters, self.copy.adam)
            message = pack_message(local, self._boxes(piece, self.rank), piece.first, piece.last)
            if message is not None:
                sending.append((piece.writer, message, self._peers.send(message, piece.writer)))
        for writer, _, work in sending:
            self._peers.wait(work, writer)

    def assembled(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece whole, float32 on the CPU; valid until the next. All must be taken."""
        arriving = [self._receive(piece) for piece in pieces]
        space = torch.empty(0)
        for piece, arrivals in zip(pieces, arriving, strict=True):
            whole = self._as_it_is(piece)
            if whole is not None:
                yield piece, whole
                continue
            shape = (piece.last - piece.first, *piece.entry.shape[1:])
            numel = piece.size // 4
            if space.numel() < numel:
                space = torch.empty(numel)
            chunk = space[:numel].view(shape)
            for rank, copies in self._copies.items():
                if rank not in self.near:
                    continue
                local = piece.entry.local(*copies)
                for place, box, low, high in self._places(piece, rank):
                    chunk[place].copy_(local_part(local, box, low, high))
            for rank, buffer, work in arrivals:
                self._peers.wait(work, rank)
                for place, *_ in self._places(piece, rank):
                    target = chunk[place]
                    target.copy_(buffer[: target.numel()].view(target.shape))
                    buffer = buffer[target.numel() :]
            yield piece, chunk

    def _as_it_is(self, piece: Piece) -> torch.Tensor | None:
        """The memory of a near copy that holds all of a piece in one run."""
        holders = [
            (rank, clipped)
            for rank in range(self._slice_map.world_size)
            for clipped in clip_rows(self._boxes(piece, rank), piece.first, piece.last)
        ]
        if len(holders) != 1 or holders[0][0] not in self.near:
            return None
        rank, (box, low, high) = holders[0]
        part = local_part(piece.entry.local(*self._copies[rank]), box, low, high)
        shape = (piece.last - piece.first, *piece.entry.shape[1:])
        return part if part.shape == shape and part.is_contiguous() else None

    def _receive(self, piece: Piece) -> list[tuple[int, torch.Tensor, dist.Work]]:
        arriving = []
        for rank in range(self._slice_map.world_size):
            if rank not in self.near:
                count = message_numel(self._boxes(piece, rank), (piece.first, piece.last))
                if count:
                    buffer = torch.empty(count, dtype=torch.float32)
                    arriving.append((rank, buffer, self._peers.receive(buffer, rank)))
        return arriving

    def _boxes(self, piece: Piece, rank: int) -> Sequence[Rectangle]:
        key = (piece.entry.name, rank)
        if key not in self._owned:
            self._owned[key] = self._slice_map.owned(*key)
        return self._owned[key]

    def _places(self, piece: Piece, rank: int) -> Iterator[tuple[tuple[slice, ...], Rectangle, int, int]]:
        """What a rank owns of a piece: where in the piece it goes, and the rows of which box."""
        for box, low, high in clip_rows(self._boxes(piece, rank), piece.first, piece.last):
            yield (slice(low - piece.first, high - piece.first), *box.unsharded_index[1:]), box, low, high
