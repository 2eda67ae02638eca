"""The collectives with their gradients, how they overlap with products, and layers on sequence slices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from argonne.tp.fused import column_products
from argonne.tp.group import SimulatedTPGroup, TPGroup
from argonne.tp.layers import ColumnParallelLinear, RowParallelLinear
from argonne.tp.regions import (
    SequenceState,
    copy_to_region,
    gather_from_region,
    gather_sequence,
    reduce_from_region,
    reduce_scatter_sequence,
    scatter_to_region,
    split_sequence,
)
from argonne.verification.simulate import simulate
from tests.tp.layer_ranks import Calls, inputs, on_ranks, seeded

# ---------------------------------------------------------------------------------------------------
# Sequence parallelism


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [1, 7, 8])
def test_column_then_row_on_sequence_slices(size: int, seq_len: int) -> None:
    """One gather and one reduce-scatter each way, and one more gather of the kept slice; any length."""
    x = inputs(2, seq_len, 6)
    first: nn.Linear = seeded(lambda: nn.Linear(6, 16, dtype=torch.float64))
    second: nn.Linear = seeded(lambda: nn.Linear(16, 6, dtype=torch.float64))
    expected_x = x.clone().requires_grad_()
    expected = second(torch.relu(first(expected_x)))
    expected.square().sum().backward()

    def build(group: TPGroup) -> nn.Module:
        state = SequenceState(enabled=size > 1, seq_len=seq_len)
        options: dict[str, Any] = {"group": group, "sequence": state, "dtype": torch.float64}
        return nn.ModuleList(
            [
                seeded(lambda: ColumnParallelLinear(6, 16, **options)),
                seeded(lambda: RowParallelLinear(16, 6, **options)),
            ]
        )

    def work(layers: Any, group: TPGroup) -> tuple[Any, ...]:
        own = x.clone().requires_grad_()
        y = layers[1](torch.relu(layers[0](split_sequence(own, group))))
        forward = dict(group.counters.calls)
        whole = gather_sequence(y, group, seq_len, partial=False)
        whole.square().sum().backward()
        grads = [parameter.grad for parameter in layers.parameters()]
        return whole.detach(), own.grad, grads, forward, dict(group.counters.calls)

    results = on_ranks(size, build, work)
    for whole, x_grad, _, forward, calls in results:
        torch.testing.assert_close(whole, expected.detach())
        torch.testing.assert_close(x_grad, expected_x.grad)
        if size > 1:
            assert forward == {"all_gather": 1, "reduce_scatter": 1}
            # split_sequence's gradient and the final gather are one all-gather each
            assert calls == {"all_gather": 1 + 2 + 2, "reduce_scatter": 2}
    wanted = [p.grad for p in (*first.parameters(), *second.parameters())]
    grads = [grads for _, _, grads, _, _ in results]
    assert all(grad is not None for grad in wanted)
    torch.testing.assert_close(torch.cat([g[0] for g in grads], 0), wanted[0])
    torch.testing.assert_close(torch.cat([g[1] for g in grads], 0), wanted[1])
    torch.testing.assert_close(torch.cat([g[2] for g in grads], 1), wanted[2])
    torch.testing.assert_close(sum(g[3] for g in grads), wanted[3])  # each rank's positions


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


# ---------------------------------------------------------------------------------------------------
# Overlap


class Journal(SimulatedTPGroup):
    """Notes when collectives are issued and waited for."""

    events: list[str]

    def start_all_reduce(self, tensor: Tensor, op: str = "sum", *, owned: bool = False) -> Tensor:
        self.events.append("issue all_reduce")
        return super().start_all_reduce(tensor, op, owned=owned)

    def start_all_gather(self, tensor: Tensor) -> Tensor:
        self.events.append("issue all_gather")
        return super().start_all_gather(tensor)

    def start_reduce_scatter(self, tensor: Tensor) -> Tensor:
        self.events.append("issue reduce_scatter")
        return super().start_reduce_scatter(tensor)

    def wait(self, tensor: Tensor) -> Tensor:
        self.events.append("wait")
        return super().wait(tensor)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes matrix products in a journal."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.events.append("product")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_reduction_runs_while_weight_gradients_are_computed(sequence_parallel: bool) -> None:
    """Issue, weight products, wait: of the entrance's reduction, and of the re-gathered input."""
    groups = [Journal(group.rank, 2, group._rendezvous) for group in SimulatedTPGroup.create(2)]

    def work(group: SimulatedTPGroup) -> list[str]:
        assert isinstance(group, Journal)
        group.events = []
        state = SequenceState(enabled=sequence_parallel, seq_len=6)
        x = inputs(2, 3 if sequence_parallel else 6, 6).requires_grad_()
        weights = [inputs(4, 6).requires_grad_(), inputs(2, 6).requires_grad_()]
        ys = column_products(x, weights, [None, None], group, state)
        loss = ys[0].sum() + ys[1].sum()
        group.events.clear()
        with Products(group.events):
            loss.backward()
        return group.events

    two, issue = ["product"] * 2, "issue reduce_scatter"
    expected = [*two, "issue all_reduce", *two, "wait"]
    if sequence_parallel:
        expected = ["issue all_gather", *two, issue, "wait", *two, "wait"]
    for events in simulate(groups, work):
        assert events == expected
