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

TORCHRUN_GRACE_SECONDS = 30.0
"""torchrun's default of ``--shutdown-timeout``."""
TORCHRUN = "torchrun --standalone --nproc_per_node=N resume_pretrain_tensor.py ..."
_HOW = "set RANK from 0 to WORLD_SIZE - 1 and WORLD_SIZE on every process, or start them with torchrun"
_OURS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
)
_FOREIGN = {
    "Slurm": ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "MPI": (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "PMI_SIZE",
        "PMI_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_RANK",
    ),
}
"""What launchers that start several processes, but no ranks, tell each of them."""


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
        where it lacks them; an empty variable counts as none. Raises ConfigError for variables that are no
        numbers, that contradict each other, or of a launcher that starts no ranks (Slurm, MPI).
        """
        environ = os.environ if environ is None else environ
        numbers = _numbers(environ)
        _check_foreign(numbers, under_torchrun="TORCHELASTIC_RUN_ID" in environ)
        _check_places(numbers)
        rank, world_size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
        if world_size > 1:
            for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
                environ[name] = environ.get(name, "").strip() or value
        fallback = local_rank_flag if local_rank_flag is not None else rank if world_size > 1 else 0
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=numbers.get("LOCAL_RANK", fallback),
            local_world_size=numbers.get("LOCAL_WORLD_SIZE", 1 if world_size == 1 else None),
            master=f"{environ.get('MASTER_ADDR', 'localhost')}:{numbers.get('MASTER_PORT', 29500)}",
            launch=_read_launch(environ, numbers),
        )


def _numbers(environ: Mapping[str, str]) -> dict[str, int]:
    """The launchers' variables that are set; ConfigError naming all that hold no whole number."""
    numbers, wrong = {}, []
    for name in (*_OURS, *(name for names in _FOREIGN.values() for name in names)):
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            numbers[name] = int(text)
        except ValueError:
            wrong.append(f"{name} is {text[:40]!r}")
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}, which is no whole number: {_HOW} ({TORCHRUN})")
    return numbers


def _check_foreign(numbers: Mapping[str, int], *, under_torchrun: bool) -> None:
    """ConfigError where another launcher started several processes that do not know of each other."""
    if under_torchrun or "RANK" in numbers or "WORLD_SIZE" in numbers:
        return
    for launcher, names in _FOREIGN.items():
        for name in names:
            # A task number above 0 says as much as a number of tasks above 1.
            several = numbers.get(name, 0) > (0 if name.endswith(("_PROCID", "_RANK")) else 1)
            if several:
                raise ConfigError(
                    f"{name} is {numbers[name]}, but RANK and WORLD_SIZE are not set, so each process that "
                    f"{launcher} started would train alone: start torchrun once per node ({TORCHRUN}; "
                    f"scripts/launch_slurm.sbatch does), or set RANK=0 WORLD_SIZE=1 for a single process"
                )


def _check_places(numbers: Mapping[str, int]) -> None:
    """ConfigError where the ranks and sizes contradict each other, or the port cannot be one."""
    rank, world_size = numbers.get("RANK"), numbers.get("WORLD_SIZE")
    local_rank, local_world_size = numbers.get("LOCAL_RANK"), numbers.get("LOCAL_WORLD_SIZE")
    if (rank is None) != (world_size is None):
        there, missing = ("RANK", "WORLD_SIZE") if world_size is None else ("WORLD_SIZE", "RANK")
        raise ConfigError(f"{there} is {numbers[there]} and {missing} is not set: {_HOW} ({TORCHRUN})")
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {world_size}: {_HOW} ({TORCHRUN})")
    size = world_size or 1
    if local_world_size is not None and not 1 <= local_world_size <= size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is {local_world_size} and WORLD_SIZE is {world_size or 'not set'}: set it to "
            f"the processes of this node, or leave it out"
        )
    if local_rank is not None and not 0 <= local_rank < (local_world_size or size):
        limit = "LOCAL_WORLD_SIZE" if local_world_size is not None else "WORLD_SIZE"
        raise ConfigError(
            f"LOCAL_RANK is {local_rank} and {limit} is {numbers.get(limit, 'not set')}: set LOCAL_RANK to "
            f"the number of the process on its node, from 0"
        )
    port = numbers.get("MASTER_PORT", 29500)
    if size > 1 and not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT is {port}: give a port from 1 to 65535, the same on every process")


def _read_launch(environ: Mapping[str, str], numbers: Mapping[str, int]) -> Launch:
    """Which torchrun started this process; without one, this process by itself."""
    host, parent = socket.gethostname(), os.getppid()
    name = environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return Launch(run_id=f"{host}:{os.getpid()}", restart_count=0, max_restarts=0, launcher_pid=None)
    return Launch(
        # "none" is torchrun's name for every run that was given none.
        run_id=name if name not in ("", "none") else f"{host}:{parent}",
        launcher=f"{host}:{parent}:{process_started(parent)}",
        restart_count=numbers.get("TORCHELASTIC_RESTART_COUNT", 0),
        max_restarts=numbers.get("TORCHELASTIC_MAX_RESTARTS", 0),
        launcher_pid=parent,
        began=process_began(parent),
        grace_seconds=_grace_seconds(command_line(parent), environ),
    )


def _grace_seconds(torchrun: list[str], environ: Mapping[str, str]) -> float:
    """How long torchrun, started with these words, waits after a signal before it kills its workers."""
    for index, word in enumerate(torchrun):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            return _seconds(value or "".join(torchrun[index + 1 : index + 2]))
    return _seconds(environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", ""))


def _seconds(text: str) -> float:
    """As torchrun reads them; its default where it would have refused the text."""
    try:
        return float(text)
    except ValueError:
        return TORCHRUN_GRACE_SECONDS
