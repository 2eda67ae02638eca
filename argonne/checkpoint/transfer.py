"""Slices on their way between the ranks and rank 0, at a save and at a load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from argonne.checkpoint.contents import Adam, TensorEntry
from argonne.checkpoint.reader import CheckpointReader
from argonne.checkpoint.rows import clip_rows, local_part, row_chunks
from argonne.checkpoint.tensor_file import Shape, read_rectangle
from argonne.errors import CheckpointError, PeerError
from argonne.tp.slices import Rectangle, SliceMap

_GO = 0


def gather_tensor(
    entry: TensorEntry, slice_map: SliceMap, local: torch.Tensor, peers: SlicePeers
) -> Iterator[torch.Tensor]:
    """The chunks of one tensor in order, float32 on the CPU, each received while its predecessor is used.

    A chunk is valid until the next is asked for: their memory is used again.
    """
    chunks = row_chunks(entry.shape)
    owned = {rank: slice_map.owned(entry.name, rank) for rank in (0, *peers.ranks)}
    pending = _receive(owned, chunks[0], peers) if chunks else []
    space = torch.empty(0)
    for index, (first, last) in enumerate(chunks):
        arriving = pending
        pending = _receive(owned, chunks[index + 1], peers) if index + 1 < len(chunks) else []
        whole = _own_rows(owned[0], local, entry.shape, first, last)
        if whole is not None:
            yield whole
            continue
        if not space.numel():
            space = torch.empty((last - first, *entry.shape[1:]), dtype=torch.float32)
        chunk = space[: last - first]
        for rectangle, low, high in clip_rows(owned[0], first, last):
            place = (slice(low - first, high - first), *rectangle.unsharded_index[1:])
            chunk[place].copy_(local_part(local, rectangle, low, high))
        for rank, buffer, work in arriving:
            peers.wait(work, rank)
            for rectangle, low, high in clip_rows(owned[rank], first, last):
                place = (slice(low - first, high - first), *rectangle.unsharded_index[1:])
                target = chunk[place]
                target.copy_(buffer[: target.numel()].view(target.shape))
                buffer = buffer[target.numel() :]
        yield chunk


def _own_rows(
    owned: Sequence[Rectangle], local: torch.Tensor, shape: Sequence[int], first: int, last: int
) -> torch.Tensor | None:
    """Rank 0's own memory of rows ``first`` to ``last`` where it can be written as it is."""
    clipped = clip_rows(owned, first, last)
    if len(clipped) != 1 or local.device.type != "cpu" or local.dtype != torch.float32:
        return None
    part = local_part(local, *clipped[0])
    return part if part.shape == (last - first, *shape[1:]) and part.is_contiguous() else None


def _receive(
    owned: Mapping[int, Sequence[Rectangle]], rows: tuple[int, int], peers: SlicePeers
) -> list[tuple[int, torch.Tensor, dist.Work]]:
    """Start receiving what each peer owns of these rows."""
    arriving = []
    for rank in peers.ranks:
        count = _message_numel(owned[rank], rows)
        if count:
            buffer = torch.empty(count, dtype=torch.float32)
            arriving.append((rank, buffer, peers.receive(buffer, rank)))
    return arriving


def _message_numel(rectangles: Sequence[Rectangle], rows: tuple[int, int]) -> int:
    return sum((high - low) * math.prod(box.size[1:]) for box, low, high in clip_rows(rectangles, *rows))


def send_slices(
    entries: Sequence[TensorEntry],
    slice_map: SliceMap,
    rank: int,
    parameters: Mapping[str, torch.Tensor],
    adam: Adam,
    control_group: dist.ProcessGroup | None,
) -> None:
    """The part of a rank other than 0: send what it owns of each tensor that rank 0 asks for."""
    peers = SlicePeers((), control_group)
    for entry in entries:
        peers.await_word()
        local = parameters[entry.name] if entry.key == "param" else adam[entry.name][entry.key]
        owned = slice_map.owned(entry.name, rank)
        sending: list[tuple[torch.Tensor, dist.Work]] = []
        for first, last in row_chunks(entry.shape):
            parts = [local_part(local, *clipped).reshape(-1) for clipped in clip_rows(owned, first, last)]
            if not parts:
                continue
            message = torch.cat(parts).to("cpu", torch.float32)
            if sending:
                peers.wait(sending.pop()[1], 0)
            sending.append((message, peers.send(message, 0)))
        for _, work in sending:
            peers.wait(work, 0)
    peers.await_word()


class SlicePeers:
    """Words and slices between rank 0 and the others; a lost rank becomes a PeerError that names it."""

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.ranks = tuple(ranks)
        self._group = group

    def go(self) -> None:
        """Tell every rank to go on."""
        for rank in self.ranks:
            self.wait(self.send(torch.tensor([_GO]), rank), rank)

    def stop(self, message: str) -> None:
        """Tell every rank to stop, and why."""
        text = torch.tensor(list(message.encode()), dtype=torch.uint8)
        for rank in self.ranks:
            self.wait(self.send(torch.tensor([len(text)]), rank), rank)
            self.wait(self.send(text, rank), rank)

    def await_word(self) -> None:
        """Wait for rank 0's word; raise its CheckpointError when it says stop."""
        word = torch.zeros(1, dtype=torch.int64)
        self.wait(self.receive(word, 0), 0)
        if int(word) != _GO:
            text = torch.zeros(int(word), dtype=torch.uint8)
            self.wait(self.receive(text, 0), 0)
            raise CheckpointError(bytes(text.tolist()).decode())

    def send(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        try:
            work = dist.isend(tensor, rank, group=self._group)
        except RuntimeError as error:
            raise _lost(rank, error) from error
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        try:
            work = dist.irecv(tensor, rank, group=self._group)
        except RuntimeError as error:
            raise _lost(rank, error) from error
        assert work is not None
        return work

    def wait(self, work: dist.Work, rank: int) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise _lost(rank, error) from error


def _lost(rank: int, error: RuntimeError) -> PeerError:
    return PeerError(f"rank {rank} left while a checkpoint was saved ({str(error)[:80]}): see its output")


LOAD_CHUNK_BYTES = 4 << 20
"""Small, for it is what a rank holds beyond its slices."""


def read_chunks(
    reader: CheckpointReader, name: str, key: str, boxes: Sequence[Rectangle]
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Chunks of a rank's boxes: where in the local tensor they go, and the values read."""
    source = reader.source(name, key)
    for first, last in row_chunks(source.shape, LOAD_CHUNK_BYTES):
        for box, low, high in clip_rows(boxes, first, last):
            values = read_rectangle(source, (low, *box.start[1:]), (high - low, *box.size[1:]))
            yield _target(box, low, high), values


def _target(box: Rectangle, low: int, high: int) -> tuple[slice, ...]:
    shift = box.local_start[0] - box.start[0]
    return (slice(low + shift, high + shift), *box.local_index[1:])


def serve_chunks(
    reader: CheckpointReader,
    name: str,
    key: str,
    slice_map: SliceMap,
    blind_ranks: Sequence[int],
    group: dist.ProcessGroup | None,
) -> None:
    for rank in blind_ranks:
        for _, values in read_chunks(reader, name, key, slice_map.rectangles(name, rank)):
            try:
                dist.send(values.contiguous(), rank, group=group)
            except RuntimeError as error:
                raise PeerError(f"rank {rank} left while its slices were sent ({str(error)[:80]})") from error


def receive_chunks(
    shape: Shape, boxes: Sequence[Rectangle], group: dist.ProcessGroup | None
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    for first, last in row_chunks(shape, LOAD_CHUNK_BYTES):
        for box, low, high in clip_rows(boxes, first, last):
            values = torch.empty((high - low, *box.size[1:]), dtype=torch.float32)
            try:
                dist.recv(values, 0, group=group)
            except RuntimeError as error:
                raise PeerError(f"rank 0 left while slices were received ({str(error)[:80]})") from error
            yield _target(box, low, high), values
