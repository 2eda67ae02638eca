"""The ranks of one save: each says something, all hear all; where one cannot go on, all raise its error."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from argonne.checkpoint.transfer import SlicePeers
from argonne.errors import CheckpointError


@dataclass(frozen=True)
class _Stop:
    """What a rank says in place of its value: the save has failed there."""

    message: str


class Meeting:
    """Gatherings of all ranks of a save, at rank 0, which so knows who has left; a single rank meets itself.

    The usual word, None, is one number each way.
    """

    def __init__(
        self, peers: SlicePeers, rank: int, world_size: int, pulse: Callable[[], None] = lambda: None
    ) -> None:
        """``pulse`` is called after each gathering."""
        self._peers, self._rank, self._world_size, self._pulse = peers, rank, world_size, pulse
        self._heard: CheckpointError | None = None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank.

        Raises the same CheckpointError on all ranks where one said `stop`, PeerError where one has left.
        """
        if self._rank != 0:
            self._tell(value, [0])
            values = self._hear([0])[0] or [None] * self._world_size
        else:
            others = range(1, self._world_size)
            values = [value, *self._hear(others)]
            self._tell(values if any(told is not None for told in values) else None, others)
        self._pulse()
        for told in values:
            if isinstance(told, _Stop):
                self._heard = CheckpointError(told.message)
                raise self._heard
        return values

    def _tell(self, value: Any, ranks: Sequence[int]) -> None:
        data = b"" if value is None else pickle.dumps(value)
        messages = [torch.tensor([len(data)])]
        if data:
            messages.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        sending = [(self._peers.send(message, rank), rank) for rank in ranks for message in messages]
        for work, rank in sending:
            self._peers.wait(work, rank)

    def _hear(self, ranks: Sequence[int]) -> list[Any]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in ranks]
        arriving = [self._peers.receive(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
        values: list[Any] = []
        for size, work, rank in zip(sizes, arriving, ranks, strict=True):
            self._peers.wait(work, rank)
            data = torch.empty(int(size), dtype=torch.uint8)
            if len(data):
                self._peers.wait(self._peers.receive(data, rank), rank)
            values.append(pickle.loads(bytes(data.numpy())) if len(data) else None)
        return values

    def stop(self, message: str) -> CheckpointError:
        """Say why this rank cannot go on; the error that all ranks raise now.

        Where another rank has said so already, no one waits any more.
        """
        if self._heard is None:
            try:
                self.gather(_Stop(message))
            except CheckpointError as error:
                return error
        return self._heard or CheckpointError(message)
