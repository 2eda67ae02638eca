"""The ranks of a run: this process's device, the groups of all ranks, the degrees and the mesh.

``World`` is all ranks before the layout of the model over them is known; ``Parallel`` adds the degrees.
"""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from argonne.errors import ConfigError, DeviceError
from argonne.ranks.faults import cannot_join
from argonne.ranks.launch import Environment
from argonne.tp.plan import check_degree, degree_fits, degree_list, fitting_degrees

AGREEMENT_TIMEOUT = timedelta(days=7)
"""Of the gloo groups: ranks wait in them through the longest save; a dead peer ends the wait at once."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Of a collective of the model, at least: NCCL's own default."""


def choose_device(environment: Environment) -> torch.device:
    """The GPU of this process, or the CPU where there is none.

    A process that is shown a single GPU takes it whatever its local rank (one visible device each).
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if environment.local_rank < count:
        index = environment.local_rank
    elif count == 1:
        index = 0
    else:
        raise DeviceError(
            f"local rank {environment.local_rank} has no GPU: {count} are visible on {socket.gethostname()}; "
            f"start at most {count} processes there"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@dataclass(frozen=True, kw_only=True)
class World:
    """All ranks, before the layout of the model over them is known."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on each host; the greatest common divisor where the hosts differ."""
    device: torch.device
    control_group: dist.ProcessGroup | None
    """All ranks over gloo, for agreement, loading and errors; None in a single process."""
    feed_group: dist.ProcessGroup | None
    """All ranks over gloo, for the broadcast of tokens in the background."""
    save_group: dist.ProcessGroup | None = None
    """All ranks over gloo, for checkpoints that are written in the background."""
    timeout: timedelta = COLLECTIVE_TIMEOUT
    """Of each collective of the model, in all groups of the mesh."""


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """The groups of sharding within a node and replication across nodes."""

    mesh: DeviceMesh
    """("dp_replicate", "dp_shard"): the ranks that have this one's tensor-parallel rank, a node a row."""
    node_group: dist.ProcessGroup
    """The ranks of this node: all that hold its copy of the model."""


@dataclass(frozen=True, kw_only=True)
class Parallel(World):
    """Degrees, coordinates and groups of this process. world_size = dp_size * tp_size."""

    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    mesh: DeviceMesh | None
    """("dp", "tp"); None in a single process."""
    hybrid: Hybrid | None = None
    """Where replicas share their state within a node only (--data-parallel hsdp)."""

    @property
    def shard_size(self) -> int:
        """Replicas that share weights and state under FSDP2: neighbours."""
        return self.dp_size if self.hybrid is None else self.hybrid.mesh.size(1)

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The ranks of this replica; None in a single process."""
        return None if self.mesh is None else self.mesh.get_group("tp")

    @property
    def world_group(self) -> dist.ProcessGroup | None:
        """All ranks, on the device's own backend."""
        return None if self.mesh is None else dist.group.WORLD


def connect(
    environment: Environment,
    device: torch.device,
    store: dist.Store | None,
    *,
    timeout: timedelta,
) -> World:
    """Join the process group of all ranks, and make the gloo groups beside it.

    To be called once all ranks have joined the ``store`` (``await_ranks``); ``timeout`` bounds each
    collective of the model. Raises DeviceError naming the endpoint, or the ranks that share a GPU.
    """
    local_world_size = 1
    control = feed = save = None
    if store is not None:
        # Before NCCL connects: its own error for a shared GPU names neither rank.
        local_world_size = _check_places(environment, device, store)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=environment.rank,
                world_size=environment.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise cannot_join(environment, error) from error
        control = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT)
        feed = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT)
        save = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT)
    return World(
        rank=environment.rank,
        world_size=environment.world_size,
        local_rank=environment.local_rank,
        local_world_size=local_world_size,
        device=device,
        control_group=control,
        feed_group=feed,
        save_group=save,
        timeout=timeout,
    )


def disconnect() -> None:
    """Leave the process groups, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_places(environment: Environment, device: torch.device, store: dist.Store) -> int:
    """Ranks on each host (their greatest common divisor where the hosts differ), the same on all ranks.

    Told through the store, which all ranks have joined. Raises DeviceError on all ranks where two of them
    share a GPU, or where the store fails.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    keys = [f"place/{rank}" for rank in range(environment.world_size)]
    told_here = json.dumps([socket.gethostname(), gpu, environment.local_world_size])
    try:
        store.set(keys[environment.rank], told_here)
        places: list[Any] = [json.loads(store.get(key)) for key in keys]
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise cannot_join(environment, error) from error
    seen: dict[tuple[str, str], int] = {}
    for rank, (name, device_id, _) in enumerate(places):
        if device_id and (name, device_id) in seen:
            raise DeviceError(
                f"ranks {seen[name, device_id]} and {rank} share one GPU of {name}: start one process per "
                "GPU (--nproc_per_node, or CUDA_VISIBLE_DEVICES for each process)"
            )
        seen[name, device_id] = rank
    ranks_of = Counter(name for name, _, _ in places)
    return math.gcd(*(told or ranks_of[name] for name, _, told in places))


def default_tp_size(local_world_size: int, query_heads: int) -> int:
    """The largest degree that divides the ranks of a node and the query heads.

    Where that is 1, the largest that divides the ranks and fits: a node that has lost a card trains on.
    """
    degrees = [d for d in range(1, local_world_size + 1) if local_world_size % d == 0]
    even = max(d for d in degrees if query_heads % d == 0)
    return even if even > 1 else max(d for d in degrees if degree_fits(query_heads, d))


def replicas_of_a_node(tp_size: int, *, world_size: int, node_size: int) -> int | None:
    """Replicas that share their state within a node under hsdp; None where one node has them all.

    Raises ConfigError where a node has one replica, or a part of one: nothing is left to share.
    """
    if world_size <= max(node_size, tp_size):
        return None
    shards = node_size // tp_size
    if shards < 2 or node_size % tp_size:
        raise ConfigError(
            f"--data-parallel hsdp shares weights and state among the replicas of a node, and with tensor "
            f"parallel {tp_size} a node of {node_size} ranks has not several: use a --tensor-parallel-size "
            f"that divides {node_size} at least twice, or --data-parallel fsdp (shares across nodes) or ddp "
            "(shares nothing)"
        )
    return shards


def resolve_tp_size(
    requested: int | None, *, world_size: int, local_world_size: int, query_heads: int
) -> int:
    """The tensor-parallel degree; raises ConfigError naming the degrees that work."""
    if requested is None:
        return default_tp_size(local_world_size, query_heads)
    check_degree(query_heads, requested, processes=world_size)
    if world_size % requested:
        degrees = fitting_degrees(query_heads)
        raise ConfigError(
            f"--tensor-parallel-size {requested} does not divide the {world_size} processes started; use "
            f"{degree_list([degree for degree in degrees if world_size % degree == 0])}, or start a multiple "
            f"of {requested} processes"
        )
    return requested


def build_parallel(world: World, tp_size: int, *, shard_size: int | None = None) -> Parallel:
    """Give each replica ``tp_size`` neighbouring ranks and make the mesh; collective.

    ``shard_size``: so many neighbouring replicas share weights and state, and the others hold copies
    (`replicas_of_a_node`); None: all share.
    """
    dp_size = world.world_size // tp_size
    mesh = _make_mesh(world, dp_size, tp_size) if world.world_size > 1 else None
    return Parallel(
        **vars(world),
        tp_rank=world.rank % tp_size,
        tp_size=tp_size,
        dp_rank=world.rank // tp_size,
        dp_size=dp_size,
        mesh=mesh,
        hybrid=None if shard_size is None else _make_hybrid(world, tp_size, shard_size),
    )


def _make_hybrid(world: World, tp_size: int, shard_size: int) -> Hybrid:
    """A row of `Hybrid.mesh` for each node; every rank makes the groups of all."""
    ranks = torch.arange(world.world_size).view(-1, shard_size, tp_size)
    replicating = _subgroup(world, "dp_replicate", ranks.permute(1, 2, 0).reshape(-1, len(ranks)))
    sharding = _subgroup(world, "dp_shard", ranks.permute(0, 2, 1).reshape(-1, shard_size))
    node = _subgroup(world, "node", ranks.flatten(1))
    own = ranks[:, :, world.rank % tp_size]
    mesh = DeviceMesh.from_group(
        [replicating, sharding], world.device.type, mesh=own, mesh_dim_names=("dp_replicate", "dp_shard")
    )
    return Hybrid(mesh=mesh, node_group=node)


def _subgroup(world: World, name: str, rows: torch.Tensor) -> dist.ProcessGroup:
    """This rank's group among ``rows`` of ranks, on the device's own backend, with the run's time limit."""
    # "cpu:gloo,cuda:nccl" -> nccl on a GPU
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    own, _ = dist.new_subgroups_by_enumeration(
        rows.tolist(), timeout=world.timeout, backend=backends[world.device.type], group_desc=f"mesh_{name}"
    )
    return own


def _make_mesh(world: World, dp_size: int, tp_size: int) -> DeviceMesh:
    """The ("dp", "tp") mesh, its groups on the device's own backend and with the run's time limit.

    ``init_device_mesh`` would take the limit from the backend's default, and hand NCCL's options to gloo.
    """
    ranks = torch.arange(world.world_size).view(dp_size, tp_size)
    groups: list[dist.ProcessGroup] = []
    for name, rows in (("dp", ranks.T), ("tp", ranks)):
        if len(rows) == 1:
            assert dist.group.WORLD is not None
            groups.append(dist.group.WORLD)
        else:
            groups.append(_subgroup(world, name, rows))
    return DeviceMesh.from_group(groups, world.device.type, mesh=ranks, mesh_dim_names=("dp", "tp"))
