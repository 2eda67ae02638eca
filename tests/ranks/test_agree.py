"""What all ranks decide together: the result or the error of rank 0 on every rank, and equal flags."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.errors import ConfigError, DataError
from argonne.ranks.agree import (
    barrier,
    broadcast_object,
    check_same,
    gather_objects,
    on_rank_0,
    only_on_rank_0,
)
from argonne.ranks.world import World
from argonne.testing.distributed import run_ranks


def world_of(rank: int, world_size: int) -> World:
    group = dist.new_group(backend="gloo") if world_size > 1 else None
    return World(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size,
        device=torch.device("cpu"), control_group=group, feed_group=None,
    )  # fmt: skip


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("this must not travel")


def results_rank(rank: int, world_size: int) -> list[Any]:
    world = world_of(rank, world_size)
    calls: list[int] = []

    def work() -> str:
        calls.append(rank)
        return f"from {rank}"

    kept = only_on_rank_0(Unpicklable, world)
    assert (kept is not None) == (rank == 0)
    barrier(world)
    return [on_rank_0(work, world), calls, broadcast_object(rank + 5, world), gather_objects(rank, world)]


@pytest.mark.parametrize("world_size", [1, 3])
def test_rank_0_works_and_all_learn(world_size: int) -> None:
    results = run_ranks(results_rank, world_size) if world_size > 1 else [results_rank(0, 1)]
    for rank, result in enumerate(results):
        assert result == ["from 0", [0] if rank == 0 else [], 5, list(range(world_size))]


def errors_rank(rank: int, world_size: int) -> list[str]:
    world = world_of(rank, world_size)

    def fail() -> None:
        raise DataError("shard.parquet is unreadable: remove it")

    said = []
    for ask in (on_rank_0, only_on_rank_0):
        with pytest.raises(DataError) as raised:
            ask(fail, world)
        said.append(str(raised.value))
    other = dataclasses.replace(world)
    check_same({"--seed": 1}, other)
    with pytest.raises(ConfigError) as raised_config:
        check_same({"--seed": 1 + (rank == 2), "--batch-size": 4}, other)
    return [*said, str(raised_config.value)]


def test_an_error_of_rank_0_and_a_differing_flag_end_every_rank() -> None:
    line = "shard.parquet is unreadable: remove it"
    for first, second, flags in run_ranks(errors_rank, 3):
        assert first == second == line
        assert flags.startswith("--seed differs between ranks: 1 on rank 0, 2 on rank 2;")
