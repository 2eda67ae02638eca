"""How the processes of a run find each other: what the launcher says, the endpoint, the store.

The ranks and their endpoint are read from the environment here and nowhere else.
"""

from __future__ import annotations

import contextlib
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from argonne.errors import DeviceError, first_line
from argonne.ranks.launch import Environment
from argonne.run.stalls import rank_list


def await_endpoint(host: str, port: int, seconds: float) -> bool:
    """Whether something listens at an endpoint within ``seconds``; the host's name may turn up meanwhile."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=left).close()
            return True
        time.sleep(min(0.5, left))
    return False


def open_store(environment: Environment, *, timeout: timedelta) -> dist.Store | None:
    """The store through which the ranks of this attempt meet; None in a single process.

    Raises DeviceError naming the endpoint where it does not answer within ``timeout``.
    """
    if environment.world_size == 1:
        return None
    seconds = timeout.total_seconds()
    host, _, port = environment.master.rpartition(":")
    # torch's own wait for the endpoint may take three times as long, and prints pages of frames.
    if environment.rank > 0 and not await_endpoint(host, int(port), seconds):
        raise DeviceError(
            f"rank {environment.rank} of {environment.world_size} found nobody at {environment.master} "
            f"(MASTER_ADDR:MASTER_PORT) within {seconds:.0f} s: start rank 0 there, or correct the endpoint"
        )
    rendezvous = dist.distributed_c10d.rendezvous
    try:
        shared, _, _ = next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise cannot_join(environment, error) from error
    # torchrun's store outlives a restart, with the addresses of the processes before: an attempt that
    # read those would find nobody there, so each has keys of its own.
    return dist.PrefixStore(f"attempt_{environment.attempt}", shared)


def private_store(store: Any) -> Any:
    """A connection of its own to the same store, for use in another thread."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore("argonne", store.clone())


def await_ranks(environment: Environment, store: dist.Store, *, timeout: timedelta) -> None:
    """Wait until every rank has come; from then on one that is not there any more has died.

    Raises DeviceError naming the endpoint and the ranks that did not come.
    """
    keys = [f"came/{rank}" for rank in range(environment.world_size)]
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store.set(keys[environment.rank], "")
        while not store.check(keys):
            if time.monotonic() > deadline:
                absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
                raise DeviceError(
                    f"{rank_list(absent)} of {environment.world_size} did not come to {environment.master} "
                    f"(MASTER_ADDR:MASTER_PORT) within {timeout.total_seconds():.0f} s: look whether every "
                    "process was started and reaches that endpoint"
                )
            time.sleep(0.02)
    except RuntimeError as error:
        raise cannot_join(environment, error) from error


def cannot_join(environment: Environment, error: Exception) -> DeviceError:
    """What an error of torch's rendezvous means to the user."""
    first = first_line(error).rstrip(".")
    return DeviceError(
        f"rank {environment.rank} of {environment.world_size} cannot join the others at "
        f"{environment.master} (MASTER_ADDR:MASTER_PORT): {first}; check that the endpoint is reachable, "
        f"that its port is free on rank 0's node and that all {environment.world_size} ranks were started"
    )
