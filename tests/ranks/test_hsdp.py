"""hsdp: replicas share weights within a node and hold copies across nodes; gathered weights that stay."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from argonne.config.options import ParallelOptions, TrainingOptions
from argonne.errors import ConfigError
from argonne.ranks.replicas import let_go_of_gathered, local_gradients
from argonne.ranks.world import replicas_of_a_node
from argonne.testing.distributed import make_parallel, run_ranks
from argonne.testing.models import loss_of, random_tokens
from argonne.training.build import build_model, fill_weights

SETTINGS: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tp_size", "world_size", "node_size", "shards"),
    [(1, 16, 8, 8), (2, 16, 8, 4), (4, 24, 8, 2), (8, 8, 8, None), (2, 8, 8, None), (1, 1, 1, None)],
)
def test_replicas_of_a_node(tp_size: int, world_size: int, node_size: int, shards: int | None) -> None:
    assert replicas_of_a_node(tp_size, world_size=world_size, node_size=node_size) == shards


@pytest.mark.parametrize(("tp_size", "node_size"), [(8, 8), (16, 8), (3, 8), (1, 1), (6, 8)])
def test_a_node_without_several_replicas_is_refused_with_the_remedy(tp_size: int, node_size: int) -> None:
    with pytest.raises(ConfigError, match=r"--data-parallel hsdp .*use a --tensor-parallel-size.*fsdp.*ddp"):
        replicas_of_a_node(tp_size, world_size=48, node_size=node_size)


def built(rank: int, world_size: int, node_size: int | None = None, **options: Any) -> Any:
    """A model on its ranks, with its first weights."""
    parallel = make_parallel(rank, world_size, 1, local_world_size=node_size)
    trained = build_model(SETTINGS, ParallelOptions(**options), TrainingOptions(), parallel)
    fill_weights(trained, None, seed=3)
    return trained


def groups_of(rank: int, world_size: int) -> tuple[list[int], list[int], list[int], bool]:
    """Who shares, who holds copies, who is on the node; and whether FSDP2 lays tensors so."""
    trained = built(rank, world_size, 2, data_parallel="hsdp")
    hybrid = trained.parallel.hybrid
    assert hybrid is not None and trained.parallel.shard_size == 2
    groups = [hybrid.mesh.get_group("dp_shard"), hybrid.mesh.get_group("dp_replicate"), hybrid.node_group]
    placed = all(p.placements == (Replicate(), Shard(0)) for p in trained.model.parameters())
    for name, local in trained.parameters().items():
        assert tuple(local.shape) == trained.slice_map.local_shape(name, rank)
    sharing, copying, node = (dist.get_process_group_ranks(group) for group in groups)
    return sharing, copying, node, placed


def test_the_groups_are_those_of_nodes() -> None:
    told = run_ranks(groups_of, 4)
    assert [sharing for sharing, *_ in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [copying for _, copying, *_ in told] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [node for *_, node, _ in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(placed for *_, placed in told)


def gradients_rank(
    rank: int, world_size: int, asked: str, kind: str
) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Losses of passes with what may come between them, the last gradients, and gathers of each pass."""
    node_size = 2 if kind == "hsdp" else None
    trained = built(rank, world_size, node_size, data_parallel=kind, reshard_after_forward=asked)
    model, losses, counts = trained.model, [], []
    for number in range(3):
        with CommDebugMode() as gathers:
            loss = loss_of(model, random_tokens(batch=2, seed=10 * number + rank))
            loss.backward()
        losses.append(loss.item())
        counts.append(gathers.get_comm_counts()[torch.ops.c10d._allgather_base_])
        with torch.no_grad():  # an evaluation, then other weights: gathered ones must not outlive it
            loss_of(model, random_tokens(batch=2, seed=rank))
            let_go_of_gathered(model)
            for local in trained.parameters().values():
                local.mul_(1.01)
    return losses, {name: grad.clone() for name, grad in local_gradients(model).items()}, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_weights_that_stay_gathered_change_nothing_but_the_gathers(kind: str) -> None:
    world_size = 4 if kind == "hsdp" else 2
    usual = run_ranks(gradients_rank, world_size, "auto", kind)
    let_go, kept = (run_ranks(gradients_rank, world_size, asked, kind) for asked in ("on", "off"))
    for same, expected in zip(let_go + kept, usual * 2, strict=True):
        assert same[0] == expected[0]
        assert all(torch.equal(same[1][name], gradient) for name, gradient in expected[1].items())
    layers = SETTINGS["num_hidden_layers"]
    assert [counts for *_, counts in usual] == [counts for *_, counts in let_go]
    # The root once; each block once, and again in the backward pass unless it stayed.
    assert usual[0][2] == [1 + 2 * layers] * 3
    assert kept[0][2] == [1 + layers] * 3
