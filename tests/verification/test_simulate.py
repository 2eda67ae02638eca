"""Simulated ranks: a right split agrees, a wrong gradient is seen, and a failing rank ends the others."""

import pytest
import torch
from torch import Tensor

from argonne.testing.models import random_tokens, small_model
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import compare_ranks, measure, measure_simulated, simulate


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (3, True), (8, True)])
def test_simulated_split_agrees(size: int, sequence_parallel: bool) -> None:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3} if size == 3 else {}
    model = small_model(torch.float64, attention_bias=True, **heads)
    tokens = random_tokens(length=13)
    reference = measure(small_model(torch.float64, attention_bias=True, **heads), tokens)
    ranks, slice_map = measure_simulated(model, tokens, size, sequence_parallel=sequence_parallel)
    comparison = compare_ranks(reference, ranks, slice_map)
    assert comparison.agrees(1e-10)
    assert not comparison.agrees(0.0)
    assert [gradient.name for gradient in comparison.gradients] == list(slice_map.names)


def test_comparison_sees_a_changed_gradient_and_an_unequal_copy() -> None:
    model, tokens = small_model(torch.float64), random_tokens()
    reference = measure(small_model(torch.float64), tokens)
    ranks, slice_map = measure_simulated(model, tokens, 2, sequence_parallel=False)
    ranks[1].gradients["norm.weight"][0] += 1e-3
    comparison = compare_ranks(reference, ranks, slice_map)
    assert comparison.unequal_copies == ("norm.weight",)
    assert not comparison.agrees(1.0)
    ranks[1].gradients["blocks.0.attn.o_proj.weight"].mul_(1.01)
    comparison = compare_ranks(reference, ranks, slice_map)
    assert comparison.worst.name == "blocks.0.attn.o_proj.weight"
    assert 1e-3 < comparison.worst.relative < 1e-2


@pytest.mark.timeout(60)
def test_a_failing_rank_ends_the_others() -> None:
    def work(group: SimulatedTPGroup) -> Tensor:
        if group.rank == 1:
            raise ZeroDivisionError("rank 1")
        return group.all_reduce(torch.ones(1))

    with pytest.raises(ZeroDivisionError, match="rank 1"):
        simulate(SimulatedTPGroup.create(3), work)
