"""The degrees and groups of a rank of a test."""

import torch
import torch.distributed as dist

from argonne.ranks.world import Parallel, World, build_parallel


def layout(rank: int, world_size: int, tp_size: int, shard_size: int | None = None) -> Parallel:
    # dp x tp ranks and the gloo group for agreement, as argonne.ranks.world.connect makes them.
    world = World(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        device=torch.device("cpu"),
        control_group=dist.new_group(backend="gloo"),
        feed_group=None,
    )
    return build_parallel(world, tp_size, shard_size=shard_size)


def single_process() -> Parallel:
    world = World(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"),
        control_group=None, feed_group=None,
    )  # fmt: skip
    return build_parallel(world, 1)
