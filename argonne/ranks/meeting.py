"""How the ranks of a run meet: the endpoint, the store behind it, and who has joined."""

from __future__ import annotations

import contextlib
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from argonne.errors import DeviceError, rank_list
from argonne.ranks.faults import cannot_join
from argonne.ranks.launch import Environment


def await_endpoint(host: str, port: int, seconds: float) -> bool:
    """Whether something listens at an endpoint within ``seconds``, in which its host may still come up."""
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
            f"rank {environment.rank} of {environment.world_size} could not connect to {environment.master} "
            f"(MASTER_ADDR:MASTER_PORT) within {seconds:.0f} s: start rank 0 there, or correct the endpoint"
        )
    rendezvous = dist.distributed_c10d.rendezvous
    try:
        shared, _, _ = next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise cannot_join(environment, error) from error
    # torchrun's store outlives a restart, with the addresses of the processes before, where no one listens
    # any more: each attempt has keys of its own.
    return dist.PrefixStore(f"attempt_{environment.launch.restart_count}", shared)


def private_store(store: Any) -> Any:
    """A connection of its own to the same store, for use in another thread."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return dist.PrefixStore("argonne", store.clone())


def await_ranks(environment: Environment, store: dist.Store, *, timeout: timedelta) -> None:
    """Wait until every rank has joined; from then on one that is gone has died.

    Raises DeviceError naming the endpoint and the ranks that did not join.
    """
    keys = [f"joined/{rank}" for rank in range(environment.world_size)]
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store.set(keys[environment.rank], "")
        while not store.check(keys):
            if time.monotonic() > deadline:
                absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
                raise DeviceError(
                    f"{rank_list(absent)} of {environment.world_size} did not join at {environment.master} "
                    f"(MASTER_ADDR:MASTER_PORT) within {timeout.total_seconds():.0f} s: check that every "
                    "process was started and reaches that endpoint"
                )
            time.sleep(0.02)
    except RuntimeError as error:
        raise cannot_join(environment, error) from error
