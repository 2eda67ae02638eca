"""The ranks of one save: each says something, all hear all; where one cannot go on, all raise its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from argonne.errors import CheckpointError, PeerError, one_line


@dataclass(frozen=True)
class _Stop:
    """What a rank says in place of its value: the save has failed there."""

    message: str


class Meeting:
    """Gatherings of all ranks of a save over its own group; a single rank meets itself."""

    def __init__(
        self, group: dist.ProcessGroup | None, world_size: int, pulse: Callable[[], None] = lambda: None
    ) -> None:
        """``pulse`` is called after each gathering."""
        self._pulse = pulse
        self._group = group
        self._world_size = world_size
        self._heard: CheckpointError | None = None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank.

        Raises the same CheckpointError on all ranks where one said `stop`, PeerError where one has left.
        """
        values: list[Any] = [value]
        if self._world_size > 1:
            values = [None] * self._world_size
            try:
                dist.all_gather_object(values, value, group=self._group)
            except RuntimeError as error:
                raise PeerError(
                    f"a rank left while a checkpoint was saved ({one_line(error)[:80]}): see its output"
                ) from error
        self._pulse()
        for told in values:
            if isinstance(told, _Stop):
                self._heard = CheckpointError(told.message)
                raise self._heard
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
