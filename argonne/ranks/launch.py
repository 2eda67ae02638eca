"""What the launcher says of this process: torchrun's variables, or ones set by hand.

They are read here and nowhere else, once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from argonne.errors import ConfigError
from argonne.run.processes import Launch, command_line, process_began, process_started

TORCHRUN_GRACE_SECONDS = "30"
"""torchrun's default of ``--shutdown-timeout``."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where this process stands among the ranks, and what started it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    """None where the launcher does not say; ranks of a host are then counted through the store."""
    master: str
    """host:port of the rendezvous."""
    launch: Launch

    @classmethod
    def read(
        cls, local_rank_flag: int | None = None, environ: MutableMapping[str, str] | None = None
    ) -> Environment:
        """From torchrun's variables, from ones set by hand, or a single process when there are none.

        ``environ`` (``os.environ`` unless given) gets the MASTER_ADDR and MASTER_PORT that several ranks need
        where it lacks them. Raises ConfigError where RANK and WORLD_SIZE contradict each other.
        """
        environ = os.environ if environ is None else environ
        rank = int(environ.get("RANK", "0"))
        world_size = int(environ.get("WORLD_SIZE", "1"))
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"RANK is {rank} and WORLD_SIZE is {world_size}: set RANK from 0 to WORLD_SIZE - 1"
            )
        if world_size > 1:
            environ.setdefault("MASTER_ADDR", "localhost")
            environ.setdefault("MASTER_PORT", "29500")
        fallback = local_rank_flag if local_rank_flag is not None else rank if world_size > 1 else 0
        local_world_size = environ.get("LOCAL_WORLD_SIZE")
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=int(environ.get("LOCAL_RANK", fallback)),
            local_world_size=int(local_world_size) if local_world_size else 1 if world_size == 1 else None,
            master=f"{environ.get('MASTER_ADDR', 'localhost')}:{environ.get('MASTER_PORT', '29500')}",
            launch=_read_launch(environ),
        )


def _read_launch(environ: Mapping[str, str]) -> Launch:
    """Which torchrun started this process; without one, this process by itself."""
    host, parent = socket.gethostname(), os.getppid()
    name = environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return Launch(run_id=f"{host}:{os.getpid()}", restart_count=0, max_restarts=0, launcher_pid=None)
    return Launch(
        # "none" is torchrun's name for every run that was given none.
        run_id=name if name not in ("", "none") else f"{host}:{parent}",
        launcher=f"{host}:{parent}:{process_started(parent)}",
        restart_count=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        max_restarts=int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")),
        launcher_pid=parent,
        began=process_began(parent),
        grace_seconds=_grace_seconds(command_line(parent), environ),
    )


def _grace_seconds(torchrun: list[str], environ: Mapping[str, str]) -> float:
    """How long torchrun, started with these words, waits after a signal before it kills its workers."""
    for index, word in enumerate(torchrun):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            return float(value or torchrun[index + 1])
    return float(environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_GRACE_SECONDS))
