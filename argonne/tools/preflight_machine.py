"""Checks of the machine before a run: devices, clocks, endpoint, collectives."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from argonne.errors import DeviceError
from argonne.ranks.agree import gather_objects
from argonne.ranks.world import World
from argonne.training.build import choose_dtype
from argonne.training.fit import available_bytes
from argonne.training.header import device_name
from tp_shard import as_tp_group

if TYPE_CHECKING:
    from argonne.tools.preflight import Preflight

TOLERANCE_SECONDS = 1.0
"""By which clocks may differ: times of records and checkpoints of several nodes are read side by side."""
_BUSY = 0.05
"""Share of a GPU's memory that may be taken before a run: by contexts of the driver and of this check."""
_TRIES = 5


def store_seconds(store: Any) -> float:
    """Of a round trip to the store behind the endpoint, in the best of a few tries."""

    def once() -> float:
        started = time.perf_counter()
        store.check(["joined/0"])
        return time.perf_counter() - started

    return min(once() for _ in range(_TRIES))


# ------------------------------------------------------------------ devices


def devices(world: World) -> str:
    """Names and memory, one device a rank (that no two ranks share one was checked as they joined)."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
    else:
        free = total = (available_bytes() or 0) // world.local_world_size
    places = gather_objects((socket.gethostname(), device_name(world.device), total, free), world)
    names = Counter(name for _, name, _, _ in places)
    hosts = len({host for host, *_ in places})
    if len(names) > 1:
        kinds = ", ".join(f"{count} x {name}" for name, count in names.items())
        raise DeviceError(f"the ranks have different devices ({kinds}): start them on equal ones")
    if world.device.type == "cuda":
        for rank, (host, _, size, left) in enumerate(places):
            if size - left > max(_BUSY * size, 2e9):
                raise DeviceError(
                    f"{(size - left) / 1e9:.1f} GB of the GPU of rank {rank} on {host} are taken: end what "
                    "uses it (nvidia-smi lists the processes)"
                )
    (name,) = names
    least = min(left for *_, left in places)
    return (
        f"{len(places)} x {name} on {hosts} host{'s' if hosts > 1 else ''}, one a rank; at least "
        f"{least / 1e9:.1f} GB free for each"
    )


# ------------------------------------------------------------------ clocks


def clocks(world: World, now: Callable[[], float] = time.time) -> str:
    """Every rank's clock against rank 0's, by the round trip that took least (Cristian 1989)."""
    if world.control_group is None:
        return "one process"
    offsets = [_offset(rank, world, now) for rank in range(1, world.world_size)]
    hosts = gather_objects(socket.gethostname(), world)
    worst, doubt, rank = max(
        ((abs(off), doubt, 1 + i) for i, (off, doubt) in enumerate(offsets)), default=(0.0, 0.0, 0)
    )
    if world.rank == 0 and worst - doubt > TOLERANCE_SECONDS:
        raise DeviceError(
            f"the clock of {hosts[rank]} (rank {rank}) differs from that of {hosts[0]} by {worst:.1f} s: "
            "synchronise them (chrony, NTP)"
        )
    return (
        f"{len(set(hosts))} host{'s' if len(set(hosts)) > 1 else ''}, within {1e3 * worst:.1f} ms of rank 0's"
    )


def _offset(rank: int, world: World, now: Callable[[], float]) -> tuple[float, float]:
    """(seconds that the clock of ``rank`` is ahead of rank 0's, how wrong that may be), on rank 0."""
    group, tries = world.control_group, []
    word = torch.zeros(1, dtype=torch.float64)
    for _ in range(_TRIES):
        if world.rank == 0:
            sent = now()
            dist.send(word, rank, group=group)
            dist.recv(word, rank, group=group)
            back = now()
            tries.append((back - sent, float(word) - (sent + back) / 2))
        elif world.rank == rank:
            dist.recv(word, 0, group=group)
            dist.send(torch.tensor([now()], dtype=torch.float64), 0, group=group)
    took, ahead = min(tries, default=(0.0, 0.0))
    return ahead, took / 2


# ------------------------------------------------------------------ collectives


def collectives(flight: Preflight) -> str:
    """Bus bandwidth of the collectives of training, at its sizes and in its dtype; their sums are checked.

    Bus bandwidth as NVIDIA's nccl-tests define it: bytes x 2 (n - 1) / n / seconds of an all-reduce, half of
    that for an all-gather or a reduce-scatter, whatever the algorithm.
    """
    parallel, start, config = flight.parallel, flight.start, flight.config
    assert parallel is not None and start is not None
    if parallel.mesh is None:
        return "one process: none"
    training = config.training
    dtype = choose_dtype(training.dtype, parallel.device)
    tokens = training.batch_size * training.block_size
    numel = tokens * int(start.settings["hidden_size"])
    parts = []
    if parallel.tp_size > 1:
        kinds = ("all_gather", "reduce_scatter") if config.parallel.sequence_parallel else ("all_reduce",)
        group = parallel.mesh.get_group("tp")
        parts += [_measure(kind, numel, dtype, group, parallel.device) for kind in kinds]
    if parallel.dp_size > 1:
        group, hybrid = parallel.mesh.get_group("dp"), parallel.hybrid
        block = _block_numel(start.settings) // parallel.tp_size
        if config.parallel.data_parallel != "ddp":
            sharing = group if hybrid is None else hybrid.mesh.get_group("dp_shard")
            parts.append(_measure("all_gather", block, dtype, sharing, parallel.device))
            parts.append(_measure("reduce_scatter", block, torch.float32, sharing, parallel.device))
            if hybrid is not None:
                across = hybrid.mesh.get_group("dp_replicate")
                held = -(-block // parallel.shard_size)
                parts.append(_measure("all_reduce", held, torch.float32, across, parallel.device))
        else:
            parts.append(_measure("all_reduce", block, torch.float32, group, parallel.device))
    backend = "NCCL" if parallel.device.type == "cuda" else "gloo"
    # The slowest rank of each: replicas and groups may lie on different links.
    slowest = [(what, min(gather_objects(rate, flight.world))) for what, rate in parts]
    return f"{backend}, bus: " + ", ".join(f"{rate / 1e9:.2f} GB/s in {what}" for what, rate in slowest)


def _block_numel(settings: Any) -> int:
    """Parameters of one block, for the size of what replicas exchange."""
    hidden, wide = int(settings["hidden_size"]), int(settings["intermediate_size"])
    heads, shared = int(settings["num_attention_heads"]), int(settings["num_key_value_heads"])
    head_dim = int(settings.get("head_dim") or hidden // heads)
    return hidden * (3 * wide + 2 * head_dim * (heads + shared))


def _measure(
    kind: str, numel: int, dtype: torch.dtype, process_group: dist.ProcessGroup, device: torch.device
) -> tuple[str, float]:
    """(what it was, bus bandwidth in bytes a second), through the calls that training makes.

    DeviceError where a result is wrong: every rank gives ones.
    """
    group = as_tp_group(process_group)
    numel = math.ceil(numel / group.size) * group.size
    given = torch.empty(numel // group.size if kind == "all_gather" else numel, dtype=dtype, device=device)

    def once() -> Tensor:
        if kind == "all_reduce":
            return group.all_reduce(given, owned=True)
        return group.all_gather(given) if kind == "all_gather" else group.reduce_scatter(given)

    given.fill_(1.0)
    expected = 1.0 if kind == "all_gather" else float(group.size)
    if not bool((once() == expected).all()):
        raise DeviceError(
            f"{kind} of {numel} values of {dtype} over {group.size} ranks gave wrong values: check the links "
            "(nvidia-smi topo -m, dmesg for Xid errors)"
        )
    given.zero_()
    seconds = min(_timed(once, device) for _ in range(_TRIES))
    size = numel * given.element_size()
    share = (group.size - 1) / group.size * (2 if kind == "all_reduce" else 1)
    return f"{kind} of {size / 1e6:.1f} MB over {group.size} ranks", size * share / seconds


def _timed(once: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - started, 1e-9)
