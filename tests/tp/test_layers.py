"""The parallel layers alone: values, gradients, collectives, against torch's layers and DTensor's split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from argonne.testing.distributed import run_ranks
from argonne.testing.models import relative_error
from argonne.tp.group import ProcessTPGroup, TPGroup
from argonne.tp.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from argonne.tp.regions import SequenceState, gather_sequence, split_sequence
from tests.tp.layer_ranks import SIZES, Calls, inputs, join, on_ranks, seeded

# ---------------------------------------------------------------------------------------------------
# Column


def run_column(layer: Any, group: TPGroup, x: Tensor, grad: Tensor) -> tuple[Any, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    forward = dict(group.counters.calls)
    own = grad
    if not layer.gather_output:
        own = F.pad(grad, (0, group.size * layer.local_out_features - layer.out_features))
        own = own.chunk(group.size, dim=-1)[group.rank]
    y.backward(own)
    bias_grad = None if layer.bias is None else layer.bias.grad
    calls = dict(group.counters.calls)
    return y.detach(), x.grad, layer.matrix.detach(), layer.weight.grad, bias_grad, forward, calls


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("out_features", [12, 13])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gather_output", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (7,), ()])
def test_column(
    size: int, out_features: int, bias: bool, gather_output: bool, shape: tuple[int, ...]
) -> None:
    x, grad = inputs(*shape, 6), inputs(*shape, out_features, seed=6)
    linear: nn.Linear = seeded(lambda: nn.Linear(6, out_features, bias, dtype=torch.float64))
    expected_x = x.clone().requires_grad_()
    expected = linear(expected_x)
    expected.backward(grad)

    def build(group: TPGroup) -> nn.Module:
        return ColumnParallelLinear(
            6, out_features, bias, group=group, gather_output=gather_output, dtype=torch.float64
        )

    results = on_ranks(size, build, lambda layer, group: run_column(layer, group, x, grad))
    ys, x_grads, weights, weight_grads, bias_grads, forwards, calls = zip(*results, strict=True)
    assert torch.equal(join(list(weights), 0, out_features), linear.weight), "torch's own initial values"
    for y in ys if gather_output else [join(list(ys), -1, out_features)]:
        torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
    for x_grad in x_grads:
        torch.testing.assert_close(x_grad, expected_x.grad, rtol=1e-12, atol=1e-12)
    assert linear.weight.grad is not None
    torch.testing.assert_close(join(list(weight_grads), 0, out_features), linear.weight.grad)
    if bias:
        assert linear.bias.grad is not None
        torch.testing.assert_close(join(list(bias_grads), 0, out_features), linear.bias.grad)
    gathers = {"all_gather": 1} if gather_output and size > 1 else {}
    assert all(forward == gathers for forward in forwards)
    reductions = {"all_reduce": 1} if size > 1 else {}
    assert all(call == {**gathers, **reductions} for call in calls)


def test_a_frozen_input_needs_no_reduction() -> None:
    def work(layer: Any, group: TPGroup) -> Calls:
        layer(inputs(2, 3, 6)).sum().backward()
        assert layer.weight.grad is not None
        return dict(group.counters.calls)

    for calls in on_ranks(2, lambda g: ColumnParallelLinear(6, 8, group=g, dtype=torch.float64), work):
        assert calls == {}


def test_frozen_weights_still_pass_the_gradient_on() -> None:
    x = inputs(2, 3, 6)
    linear: nn.Linear = seeded(lambda: nn.Linear(6, 8, dtype=torch.float64))
    expected = x.clone().requires_grad_()
    linear(expected).square().sum().backward()

    def work(layer: Any, group: TPGroup) -> Tensor:
        layer.requires_grad_(False)
        own = x.clone().requires_grad_()
        layer(own).square().sum().backward()
        assert layer.weight.grad is None and layer.bias.grad is None and own.grad is not None
        return own.grad

    for grad in on_ranks(2, lambda g: ColumnParallelLinear(6, 8, group=g, dtype=torch.float64), work):
        torch.testing.assert_close(grad, expected.grad)


# ---------------------------------------------------------------------------------------------------
# Row


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_features", [12, 13])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_is_parallel", [True, False])
def test_row(size: int, in_features: int, bias: bool, input_is_parallel: bool) -> None:
    x, grad = inputs(2, 5, in_features), inputs(2, 5, 6, seed=6)
    linear: nn.Linear = seeded(lambda: nn.Linear(in_features, 6, bias, dtype=torch.float64))
    expected_x = x.clone().requires_grad_()
    expected = linear(expected_x)
    expected.backward(grad)

    def build(group: TPGroup) -> nn.Module:
        return RowParallelLinear(
            in_features, 6, bias, group=group, input_is_parallel=input_is_parallel, dtype=torch.float64
        )

    def work(layer: Any, group: TPGroup) -> tuple[Any, ...]:
        own = x
        if input_is_parallel:
            own = F.pad(x, (0, group.size * layer.local_in_features - in_features))
            own = own.chunk(group.size, dim=-1)[group.rank]
        own = own.clone().requires_grad_()
        y = layer(own)
        forward = dict(group.counters.calls)
        y.backward(grad)
        bias_grad = layer.bias.grad if bias else None
        calls = dict(group.counters.calls)
        return y.detach(), own.grad, layer.matrix.detach(), layer.weight.grad, bias_grad, forward, calls

    ys, x_grads, weights, weight_grads, bias_grads, forwards, calls = zip(
        *on_ranks(size, build, work), strict=True
    )
    assert torch.equal(join(list(weights), 1, in_features), linear.weight)
    for y in ys:
        torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
    assert expected_x.grad is not None and linear.weight.grad is not None
    if input_is_parallel:
        torch.testing.assert_close(join(list(x_grads), -1, in_features), expected_x.grad)
    else:
        for x_grad in x_grads:
            torch.testing.assert_close(x_grad, expected_x.grad)
    torch.testing.assert_close(join(list(weight_grads), 1, in_features), linear.weight.grad)
    for bias_grad in bias_grads if bias else []:
        torch.testing.assert_close(bias_grad, linear.bias.grad)
    reductions = {"all_reduce": 1} if size > 1 else {}
    gathers = {"all_gather": 1} if size > 1 and not input_is_parallel else {}
    assert all(forward == reductions for forward in forwards)
    assert all(call == {**reductions, **gathers} for call in calls)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hidden", [16, 19])
def test_column_then_row(size: int, hidden: int) -> None:
    """The pair of the docstrings: two collectives in all; padded features do not leak."""
    x = inputs(2, 3, 6)

    def plain() -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, hidden, dtype=torch.float64), nn.Sigmoid(), nn.Linear(hidden, 5, dtype=torch.float64)
        )

    def build(group: TPGroup) -> nn.Module:
        return nn.Sequential(
            ColumnParallelLinear(6, hidden, group=group, dtype=torch.float64),
            nn.Sigmoid(),  # 0.5 for padding: only the row layer's zero columns keep that out
            RowParallelLinear(hidden, 5, group=group, dtype=torch.float64),
        )

    expected_x = x.clone().requires_grad_()
    expected = seeded(plain)(expected_x)
    expected.square().sum().backward()

    def work(pair: Any, group: TPGroup) -> tuple[Tensor, Tensor, Calls]:
        own = x.clone().requires_grad_()
        y = pair(own)
        y.square().sum().backward()
        assert own.grad is not None
        return y.detach(), own.grad, dict(group.counters.calls)

    for y, x_grad, calls in on_ranks(size, build, work):
        torch.testing.assert_close(y, expected.detach())
        torch.testing.assert_close(x_grad, expected_x.grad)
        assert calls == ({"all_reduce": 2} if size > 1 else {})


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


# ---------------------------------------------------------------------------------------------------
# Embedding


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding_idx", [None, 0, 4, 9, -1, -10])
def test_embedding(size: int, padding_idx: int | None) -> None:
    ids = torch.randint(0, 10, (3, 7), generator=torch.Generator().manual_seed(1))
    grad = inputs(3, 7, 4)
    embedding: nn.Embedding = seeded(lambda: nn.Embedding(10, 4, padding_idx, dtype=torch.float64))
    embedding(ids).backward(grad)

    def build(group: TPGroup) -> nn.Module:
        return VocabParallelEmbedding(10, 4, group=group, padding_idx=padding_idx, dtype=torch.float64)

    def work(layer: Any, group: TPGroup) -> tuple[Tensor, Tensor, Tensor, Calls]:
        y = layer(ids)
        y.backward(grad)
        return y.detach(), layer.weight.detach(), layer.weight.grad, dict(group.counters.calls)

    ys, weights, grads, calls = zip(*on_ranks(size, build, work), strict=True)
    assert torch.equal(join(list(weights), 0, 10), embedding.weight)
    for y in ys:
        assert torch.equal(y, embedding(ids))
    assert embedding.weight.grad is not None
    torch.testing.assert_close(join(list(grads), 0, 10), embedding.weight.grad)
    assert all(call == ({"all_reduce": 1} if size > 1 else {}) for call in calls)


@pytest.mark.parametrize("wrong", [-1, 9, 10, 11])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int) -> None:
    """9 ids on 2 ranks leave a padded row, which is nobody's id."""

    def work(layer: Any, group: TPGroup) -> Tensor:
        return layer(torch.tensor([[0, wrong]]))

    with pytest.raises(IndexError, match="outside the vocabulary of 9"):
        on_ranks(2, lambda group: VocabParallelEmbedding(9, 4, group=group), work)


# ---------------------------------------------------------------------------------------------------
# PyTorch's own tensor parallelism


class Feedforward(nn.Module):
    """Embedding, two gated halves and a head, as DTensor's tutorial splits them."""

    def __init__(self, linear: Callable[..., nn.Module], row: Callable[..., nn.Module], bias: bool) -> None:
        super().__init__()
        self.gate, self.up = linear(8, 12, bias), linear(8, 12, bias)
        self.down = row(12, 8, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def dtensor_rank(rank: int, world_size: int, bias: bool) -> tuple[float, dict[str, float], Calls]:
    """Relative differences of output and gradients between DTensor's split and ours, same weights."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    group = ProcessTPGroup(mesh.get_group("tp"))

    def theirs() -> nn.Module:
        def linear(i: int, o: int, b: bool) -> nn.Module:
            return nn.Linear(i, o, b, dtype=torch.float64)

        return Feedforward(linear, linear, bias)

    def ours() -> nn.Module:
        return Feedforward(
            lambda i, o, b: ColumnParallelLinear(i, o, b, group=group, dtype=torch.float64),
            lambda i, o, b: RowParallelLinear(i, o, b, group=group, dtype=torch.float64),
            bias,
        )

    reference = parallelize_module(
        seeded(theirs), mesh, {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    module = seeded(ours)
    x = inputs(2, 5, 8)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_theirs, y_ours = reference(x_theirs), module(x_ours)
    assert isinstance(y_theirs, Tensor)
    y_theirs.square().sum().backward()
    y_ours.square().sum().backward()
    assert x_ours.grad is not None and x_theirs.grad is not None
    errors = {"x": relative_error(x_ours.grad, x_theirs.grad)}
    for name, parameter in module.named_parameters():
        other = reference.get_parameter(name).grad
        assert isinstance(other, DTensor) and parameter.grad is not None
        local = other.to_local()
        assert local.shape == parameter.grad.shape
        errors[name] = relative_error(parameter.grad, local)
    return relative_error(y_ours.detach(), y_theirs.detach()), errors, dict(group.counters.calls)


@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_dtensor(bias: bool) -> None:
    for error, errors, calls in run_ranks(dtensor_rank, 2, bias):
        assert error < 1e-13
        assert len(errors) == (7 if bias else 4)
        assert max(errors.values()) < 1e-12, errors
        assert calls == {"all_reduce": 1 + 2}  # gate and up enter alone here
