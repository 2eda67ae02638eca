"""Where ranks are, told before NCCL connects, and the groups of the mesh."""

import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import argonne.ranks.world as world_module
from argonne.errors import DeviceError
from argonne.ranks.launch import Environment
from argonne.ranks.world import World, build_parallel, connect
from argonne.testing.distributed import run_ranks

LIMIT = timedelta(seconds=4321)


def environment(rank: int) -> Environment:
    return Environment.read(environ={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})


def store_with(rank_1_gpu: str) -> dist.Store:
    """A store in which rank 1 of 2 has said where it is."""
    store = dist.HashStore()
    store.set("place/1", f'["{socket.gethostname()}", "{rank_1_gpu}", null]')
    return store


def test_two_ranks_on_one_gpu_are_named_before_any_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def connecting(*_: object, **__: object) -> None:
        raise AssertionError("NCCL connects")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(world_module.dist, "init_process_group", connecting)
    with pytest.raises(DeviceError, match=r"ranks 0 and 1 share one GPU of .*: start one process per GPU"):
        connect(environment(0), torch.device("cuda", 0), store_with("GPU-1"), timeout=LIMIT)
    with pytest.raises(AssertionError, match="NCCL connects"):
        connect(environment(0), torch.device("cuda", 0), store_with("GPU-2"), timeout=LIMIT)


def limits_of(rank: int, world_size: int, tp_size: int) -> list[tuple[int, float, str]]:
    """Size, time limit in seconds and backend of the dp and the tp group."""
    world = World(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size,
        device=torch.device("cpu"), control_group=None, feed_group=None, timeout=LIMIT,
    )  # fmt: skip
    mesh = build_parallel(world, tp_size).mesh
    assert mesh is not None and mesh.mesh_dim_names == ("dp", "tp")
    told: list[tuple[int, float, str]] = []
    for name in ("dp", "tp"):
        group = mesh.get_group(name)
        total = torch.tensor(float(rank))
        dist.all_reduce(total, group=group)
        peers = dist.get_process_group_ranks(group)
        assert total == sum(peers) and rank in peers and mesh.get_local_rank(name) == peers.index(rank)
        limit = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        told.append((len(peers), limit, dist.get_backend(group)))
    return told


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_groups_of_the_mesh_have_the_runs_limit(tp_size: int) -> None:
    for told in run_ranks(limits_of, 4, tp_size):
        assert [size for size, _, _ in told] == [4 // tp_size, tp_size]
        for size, limit, backend in told:
            assert backend == "gloo"
            assert limit == LIMIT.total_seconds() or size == 4  # all ranks: the group that connect made
