"""How checkpoints are written: between two steps, or in the background from a copy in host memory."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from argonne.errors import ConfigError
from argonne.ranks.agree import gather_objects
from argonne.run.control import RunControl
from argonne.training.build import TrainedModel
from argonne.training.fit import available_bytes
from checkpointing import BackgroundSave, HostCopy, SaveReport, host_copy_bytes, save_checkpoint

FLAG = "--async-checkpoint"
_SHARE = 0.8
"""Of a host's free memory that the copies may take: data processes and the page cache want some too."""


@dataclass(frozen=True, kw_only=True)
class SavingMode:
    """Whether saves go on in the background; the same on all ranks."""

    background: bool
    text: str
    """For the header: what holds, and why."""


def choose_saving(asked: str, trained: TrainedModel, control: RunControl) -> SavingMode:
    """What ``--async-checkpoint`` (auto, on, off) means here, told to the run's status; collective.

    Raises ConfigError on all ranks where it is on and a host's memory has no room for its ranks' copies.
    """
    mode = _choose(asked, trained)
    control.record(async_checkpoint=mode.background)
    return mode


def _choose(asked: str, trained: TrainedModel) -> SavingMode:
    parallel = trained.parallel
    if asked == "off" or (asked == "auto" and parallel.device.type != "cuda"):
        why = "off" if asked == "off" else "auto: there is no GPU to keep busy"
        return SavingMode(background=False, text=f"between two steps ({FLAG} {why})")
    mine = (socket.gethostname(), host_copy_bytes(trained.slice_map, parallel.rank), available_bytes())
    need: dict[str, int] = {}
    free: dict[str, int] = {}
    for host, size, available in gather_objects(mine, parallel):
        need[host] = need.get(host, 0) + size
        free[host] = min(free.get(host, available or 0), available or 0)
    short = [host for host in need if need[host] > _SHARE * free[host]]
    host = short[0] if short else max(need, key=lambda name: need[name])
    told = f"{need[host]:,} bytes of host memory"
    if not short:
        text = f"in the background, from a copy in {told} a node ({FLAG} {asked})"
        return SavingMode(background=True, text=text)
    if asked == "on":
        raise ConfigError(
            f"{FLAG} on needs {told} on {host}, which has {free[host]:,} free, {_SHARE:.0%} of them at most: "
            f"free some, or use {FLAG} off"
        )
    text = f"between two steps ({FLAG} auto: a copy needs {told} on {host}, which has {free[host]:,} free)"
    return SavingMode(background=False, text=text)


class Saver:
    """Writes checkpoints of a trained model; every method is collective.

    Saves have a process group of their own: what the loop does meanwhile never meets their messages.
    """

    def __init__(self, trained: TrainedModel, pulse: Callable[[], None], *, background: bool) -> None:
        """``pulse`` is called as a save goes on; ``background``: saves may go on in the background."""
        self._trained, self._pulse = trained, pulse
        self.running = BackgroundSave()
        """The save in the background."""
        parallel = trained.parallel
        self._copy: HostCopy | None = None
        if background:
            self._copy = HostCopy(trained.slice_map, parallel.rank, parallel.device)

    @property
    def background(self) -> bool:
        """Saves may go on in the background."""
        return self._copy is not None

    def save(self, path: Path, metadata: Mapping[str, Any]) -> SaveReport | None:
        """Write the model as it is, now. The save in the background must have been waited for."""
        trained = self._trained
        return save_checkpoint(
            path, parameters=trained.parameters(), adam=trained.adam(), **self._common(metadata)
        )

    def begin(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Copy the model as it is and write the copy in the background."""
        assert self._copy is not None
        self._copy.take(self._trained.parameters(), self._trained.adam())
        common = self._common(metadata)
        for key in ("param_group", "metadata"):  # the loop changes what it holds while this is written
            common[key] = copy.deepcopy(common[key])
        common |= {"parameters": self._copy.parameters, "adam": self._copy.adam}
        self.running.begin(partial(save_checkpoint, path, **common))

    def _common(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        trained = self._trained
        return {
            "slice_map": trained.slice_map,
            "rank": trained.parallel.rank,
            "param_group": trained.adam_options(),
            "metadata": dict(metadata),
            "tied": trained.tied,
            "control_group": trained.parallel.save_group,
            "pulse": self._pulse,
        }
