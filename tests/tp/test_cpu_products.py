"""Products by oneDNN are the products torch gives: values, gradients, strides, recomputation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import argonne.tp.cpu_products as tp_products
from argonne.ranks.recompute import recompute_blocks
from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.tp.cpu_products import add_matrix_product, linear, matrix_product, times_transposed
from tp_shard import shard_tensor_parallel

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp_products, "LEAST_FLOPS", 0)


class CountProducts(TorchDispatchMode):
    """Counts the products that are computed, not those that were kept."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


def uses_onednn(call: object) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()  # type: ignore[operator]
    return any("mkldnn" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_and_its_gradients(has_bias: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 10)
    weight = torch.randn(10, 12).t() if transposed else torch.randn(12, 10)
    bias = torch.randn(12) if has_bias else None
    operands = [x, weight, *([bias] if bias is not None else [])]
    results: list[list[Tensor]] = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        leaves = [operand.detach().to(dtype).requires_grad_() for operand in operands]
        y = function(*leaves)
        y = y.mul_(2.0)  # the exit of a row layer overwrites its product
        results.append([y.detach(), *torch.autograd.grad((y * torch.arange(12.0)).sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        assert relative_error(ours, expected) < 1e-6
    assert uses_onednn(lambda: linear(x, weight, bias))


def test_matrix_products_of_views() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(9, 14), torch.randn(9, 6)
    assert relative_error(matrix_product(left.t(), right), left.double().t() @ right.double()) < 1e-6
    total = torch.randn(14, 6)
    expected = total.double() + left.double().t() @ right.double()
    assert relative_error(add_matrix_product(total.clone(), left.t(), right), expected) < 1e-6
    expected = torch.einsum("ab,ac->bc", left.double(), right.double())
    assert relative_error(times_transposed(left.t(), right.t()), expected) < 1e-6


def test_other_dtypes_autocast_and_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    assert not uses_onednn(lambda: linear(x.double(), weight.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(tp_products, "LEAST_FLOPS", 1 << 22)
    assert not uses_onednn(lambda: linear(x, weight))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_gradients_of_a_model(mode: str) -> None:
    """In float32 against the unsplit model in float64; recomputation gives the same bits."""
    tokens = random_tokens()
    gradients = {}
    for recompute in ("none", mode):
        model = shard_tensor_parallel(small_model(torch.float32))
        recompute_blocks(model.blocks, recompute)  # type: ignore[arg-type]
        model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
        gradients[recompute] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    reference = small_model(torch.float32).double()
    reference(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        assert relative_error(gradients["none"][name], parameter.grad) < 1e-5, name
        assert torch.equal(gradients[mode][name], gradients["none"][name]), name


def test_selective_recomputation_keeps_the_products() -> None:
    tokens = random_tokens()
    counts = []
    for mode in ("none", "selective"):
        model = shard_tensor_parallel(small_model(torch.float32))
        recompute_blocks(model.blocks, mode)  # type: ignore[arg-type]
        with CountProducts() as counter:
            model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
        counts.append(counter.count)
    assert counts[0] == counts[1] > 0
