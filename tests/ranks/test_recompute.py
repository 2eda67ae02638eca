"""Recomputed and compiled blocks leave the mathematics alone."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from argonne.ranks.recompute import compile_blocks, recompute_blocks
from argonne.testing.distributed import run_ranks
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from tp_shard import shard_tensor_parallel


def recompute_rank(
    rank: int, world_size: int, mode: str, sequence_parallel: bool
) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the collectives the process group really carried (a replayed call may be answered
    from what was kept, so the group object's own counter does not tell)."""
    group = dist.new_group(backend="gloo")
    model = shard_tensor_parallel(small_model(torch.float32), group, sequence_parallel=sequence_parallel)
    recompute_blocks(model.blocks, mode)  # type: ignore[arg-type]
    before = group._get_sequence_number_for_group()
    loss_of(model, random_tokens()).backward()
    calls = group._get_sequence_number_for_group() - before
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recomputation_gives_the_same_bits(sequence_parallel: bool) -> None:
    plain, calls = run_ranks(recompute_rank, 2, "none", sequence_parallel)[0]
    layers = 2
    expected = {"selective": calls, "full": calls + layers * (3 if sequence_parallel else 1)}
    for mode, expected_calls in expected.items():
        again, mode_calls = run_ranks(recompute_rank, 2, mode, sequence_parallel)[0]
        assert all(torch.equal(again[name], gradient) for name, gradient in plain.items()), mode
        # full: the attention's exit is replayed (and with sequence parallelism both entrances); the last
        # exit, whose result nothing in the backward pass needs, is not.
        assert mode_calls == expected_calls


def compiled_rank(rank: int, world_size: int, mode: str, sequence_parallel: bool) -> tuple[float, int, int]:
    """Largest relative difference to eager, graph breaks, and graphs compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    gradients = []
    for compiled in (False, True):
        model = shard_tensor_parallel(small_model(torch.float32), sequence_parallel=sequence_parallel)
        recompute_blocks(model.blocks, mode)  # type: ignore[arg-type]
        if compiled:
            compile_blocks(model.blocks)  # type: ignore[arg-type]
        loss_of(model, random_tokens()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, fast = gradients
    worst = max(relative_error(fast[name], gradient) for name, gradient in eager.items())
    return worst, sum(counters["graph_break"].values()), counters["frames"]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_compiled_blocks_have_no_graph_break(mode: str, sequence_parallel: bool) -> None:
    for worst, breaks, graphs in run_ranks(compiled_rank, 2, mode, sequence_parallel):
        assert worst < 1e-5
        assert breaks == 0
        assert graphs >= 1
