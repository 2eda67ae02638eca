"""The region functions: each collective and its mirror image in the backward pass."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from argonne.tp.group import TPGroup
from argonne.tp.regions import (
    copy_to_region,
    gather_from_region,
    gather_sequence,
    reduce_from_region,
    reduce_scatter_sequence,
    scatter_to_region,
    split_sequence,
)
from tests.tp.layer_ranks import Calls, inputs, on_ranks


def _gather_seven(x: Tensor, group: TPGroup) -> Tensor:
    return gather_sequence(x, group, 7)


def _gather_seven_whole(x: Tensor, group: TPGroup) -> Tensor:
    return gather_sequence(x, group, 7, partial=False)


REGIONS: list[tuple[Callable[[Tensor, TPGroup], Tensor], Calls, Calls]] = [
    (copy_to_region, {}, {"all_reduce": 1}),
    (reduce_from_region, {"all_reduce": 1}, {}),
    (gather_from_region, {"all_gather": 1}, {}),
    (scatter_to_region, {}, {"all_gather": 1}),
    (_gather_seven, {"all_gather": 1}, {"reduce_scatter": 1}),
    (_gather_seven_whole, {"all_gather": 1}, {}),
    (reduce_scatter_sequence, {"reduce_scatter": 1}, {"all_gather": 1}),
    (split_sequence, {}, {"all_gather": 1}),
]


@pytest.mark.parametrize(("region", "forward", "backward"), REGIONS)
def test_region_functions_mirror_their_collectives(
    region: Callable[[Tensor, TPGroup], Tensor], forward: Calls, backward: Calls
) -> None:
    def work(_: Any, group: TPGroup) -> tuple[Calls, Calls]:
        x = inputs(2, 4, 6).requires_grad_()
        y = region(x, group)
        calls = dict(group.counters.calls)
        group.counters.reset()
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        return calls, dict(group.counters.calls)

    for calls in on_ranks(2, lambda group: nn.Identity(), work):
        assert calls == (forward, backward)
    alone = TPGroup(0, 1)
    x = inputs(2, 4, 6)
    assert region(x, alone) is x and not alone.counters.calls, "a group of one returns at once"
