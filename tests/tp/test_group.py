"""The group object: from which meshes and groups it is made, its subgroups, and what it counts."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from argonne.testing.distributed import run_ranks
from argonne.tp.group import ProcessTPGroup, SimulatedTPGroup, TPGroup, as_tp_group
from argonne.verification.simulate import simulate


def made_from(rank: int, world_size: int) -> list[tuple[int, int]]:
    """(rank, size) of the groups of a 2 x 2 mesh, its "tp" submesh, a mesh without names and the world."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    unnamed = init_device_mesh("cpu", (4,))
    groups = [as_tp_group(each) for each in (mesh, mesh["tp"], unnamed, None, dist.group.WORLD)]
    return [(group.rank, group.size) for group in groups]


def test_made_from_meshes_and_process_groups() -> None:
    for rank, made in enumerate(run_ranks(made_from, 4)):
        assert made == [(rank % 2, 2), (rank % 2, 2), (rank, 4), (rank, 4), (rank, 4)]


def test_without_a_process_group_the_world_is_one_rank() -> None:
    group = as_tp_group(None)
    assert (group.rank, group.size) == (0, 1)
    assert as_tp_group(group) is group


def test_a_group_of_one_returns_its_argument_and_counts_nothing() -> None:
    group, tensor = TPGroup(0, 1), torch.ones(3)
    for collective in (group.all_reduce, group.all_gather, group.reduce_scatter):
        assert collective(tensor) is tensor
    assert group.counters.totals() == {}


def collectives(group: TPGroup) -> tuple[list[Tensor], dict[str, tuple[int, int]]]:
    mine = torch.arange(8.0).view(4, 2) * (group.rank + 1)
    results = [
        group.all_reduce(mine.clone()),
        group.all_reduce(mine.clone(), "max", owned=True),
        group.all_gather(mine),
        group.reduce_scatter(mine),
    ]
    pair = group.subgroup(2)
    return [*results, pair.all_gather(mine)], group.counters.totals()


def collectives_over_gloo(rank: int, world_size: int) -> tuple[list[Tensor], dict[str, tuple[int, int]]]:
    assert dist.group.WORLD is not None
    return collectives(ProcessTPGroup(dist.group.WORLD))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_collectives_and_their_payload(kind: str) -> None:
    if kind == "processes":
        results = run_ranks(collectives_over_gloo, 4)
    else:
        results = simulate(SimulatedTPGroup.create(4), collectives)
    base = torch.arange(8.0).view(4, 2)
    for rank, ((total, largest, gathered, scattered, pair), counted) in enumerate(results):
        assert torch.equal(total, 10 * base)
        assert torch.equal(largest, 4 * base)
        assert torch.equal(gathered, torch.cat([base, 2 * base, 3 * base, 4 * base]))
        assert torch.equal(scattered, 10 * base[rank : rank + 1])
        first = rank - rank % 2 + 1
        assert torch.equal(pair, torch.cat([first * base, (first + 1) * base]))
        # 8 elements of 4 bytes; the payload is that of the unsharded side, the subgroup counts for itself
        assert counted == {"all_reduce": (2, 64), "all_gather": (1, 128), "reduce_scatter": (1, 32)}
