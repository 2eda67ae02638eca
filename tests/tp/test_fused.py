"""Products that share an entrance: one collective for all, under way while weight gradients are computed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from argonne.tp.fused import column_products
from argonne.tp.group import SimulatedTPGroup, TPGroup
from argonne.tp.layers import ColumnParallelLinear
from argonne.tp.regions import (
    SequenceState,
)
from argonne.verification.simulate import simulate
from tests.tp.layer_ranks import SIZES, Calls, inputs, join, on_ranks


@pytest.mark.parametrize("size", SIZES)
def test_a_shared_entrance_is_one_collective(size: int) -> None:
    """Three layers of one input: the gradients of the input add up before the one reduction."""
    x = inputs(2, 3, 6)
    linears = []
    for out_features in (12, 4, 7):
        torch.manual_seed(out_features)
        linears.append(nn.Linear(6, out_features, dtype=torch.float64))
    expected_x = x.clone().requires_grad_()
    sum((linear(expected_x).square().sum() for linear in linears), torch.zeros(())).backward()

    def build(group: TPGroup) -> nn.Module:
        def layer(out_features: int) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(out_features)
                return ColumnParallelLinear(
                    6, out_features, group=group, enter_region=False, dtype=torch.float64
                )

        return nn.ModuleList([layer(n) for n in (12, 4, 7)])

    def work(layers: Any, group: TPGroup) -> tuple[Tensor, list[Tensor], Calls]:
        own = x.clone().requires_grad_()
        ys = column_products(own, [m.matrix for m in layers], [m.bias for m in layers], group)
        sum((y.square().sum() for y in ys), torch.zeros(())).backward()
        assert own.grad is not None
        return own.grad, [layer.weight.grad for layer in layers], dict(group.counters.calls)

    results = on_ranks(size, build, work)
    for x_grad, _, calls in results:
        torch.testing.assert_close(x_grad, expected_x.grad)
        assert calls == ({"all_reduce": 1} if size > 1 else {})
    for number, linear in enumerate(linears):
        whole = join([weight_grads[number] for _, weight_grads, _ in results], 0, linear.out_features)
        torch.testing.assert_close(whole, linear.weight.grad)


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
