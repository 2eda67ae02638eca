"""Products by oneDNN are the products torch gives: values, gradients, strides, recomputation, fall-back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import argonne.tp.cpu_products as cpu_products
from argonne.ranks.recompute import recompute_blocks
from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.tp.cpu_products import add_matrix_product, linear, matrix_product, times_transposed
from tp_shard import shard_tensor_parallel

MKL_IS_FASTER = cpu_products.mkl_is_faster

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def however_small_on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cpu_products, "mkl_is_faster", lambda: False)


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


def test_torchs_own_on_intels_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    monkeypatch.setattr(cpu_products, "mkl_is_faster", lambda: True)
    assert not uses_onednn(lambda: linear(x, weight))
    assert not cpu_products.onednn_is_used()


@pytest.mark.parametrize(
    ("processors", "has_mkl", "faster"),
    [
        ("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\n", True, True),
        ("vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\n", False, False),
        ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9R14\n", True, False),
        (None, True, False),
    ],
)
def test_where_mkl_is_faster(
    processors: str | None, has_mkl: bool, faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    path = tmp_path / "cpuinfo"
    if processors is not None:
        path.write_text(processors)
    assert MKL_IS_FASTER(path) is faster


def test_other_dtypes_autocast_and_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    assert not uses_onednn(lambda: linear(x.double(), weight.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(cpu_products, "LEAST_FLOPS", 1 << 22)
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


# ---------------------------------------------------------------------------------------------------
# A torch without the op, or with one that refuses


def refuses(*_: Any) -> Tensor:
    raise RuntimeError("could not create a primitive descriptor for the matmul primitive")


def means_something_else(rows: Tensor, right: Tensor, *_: Any) -> Tensor:
    return rows @ right.t() + 1.0


@pytest.fixture
def replaced_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Puts a function in the place of oneDNN's op, or takes the op away (None); decided anew each time."""

    def replace(op: Any) -> None:
        ops = SimpleNamespace(aten=torch.ops.aten, mkldnn=SimpleNamespace())
        if op is not None:
            ops.mkldnn._linear_pointwise = op
        monkeypatch.setattr(cpu_products.torch, "ops", ops)
        cpu_products.onednn_works.cache_clear()

    cpu_products.onednn_works.cache_clear()
    yield replace
    cpu_products.onednn_works.cache_clear()


def products_and_gradients() -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 10, requires_grad=True)
    weight, bias = torch.randn(12, 10, requires_grad=True), torch.randn(12, requires_grad=True)
    y = linear(x, weight, bias).mul_(2.0)
    y.square().sum().backward()
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    left, right, total = torch.randn(9, 14), torch.randn(9, 6), torch.randn(14, 6)
    return [
        y.detach(), x.grad, weight.grad, bias.grad, matrix_product(left.t(), right),
        add_matrix_product(total, left.t(), right), times_transposed(x.detach(), weight.detach()),
    ]  # fmt: skip


@pytest.mark.parametrize("op", [None, refuses, means_something_else])
def test_without_a_usable_op_the_products_are_torchs(
    op: Any, replaced_op: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cpu_products, "LEAST_FLOPS", 1 << 60)
        torchs = products_and_gradients()
    replaced_op(op)
    for ours, expected in zip(products_and_gradients(), torchs, strict=True):
        assert torch.equal(ours, expected)
    assert not cpu_products.onednn_works()


def test_operands_that_alone_are_refused(
    replaced_op: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Works for the small products that decide, refuses larger ones: those are torch's, gradients too."""
    usual = torch.ops.mkldnn._linear_pointwise
    with monkeypatch.context() as patch:
        patch.setattr(cpu_products, "LEAST_FLOPS", 1 << 60)
        torchs = products_and_gradients()
    replaced_op(lambda rows, *rest: refuses() if rows.numel() > 12 else usual(rows, *rest))
    for ours, expected in zip(products_and_gradients(), torchs, strict=True):
        assert relative_error(ours, expected) < 1e-6
    assert cpu_products.onednn_works()


def test_operands_at_fault_are_still_an_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(4, 8), torch.randn(6, 7))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_the_first_product_may_lie_in_a_recomputed_block(mode: str) -> None:
    """Selective recomputation keeps the products that it sees: those that decide must not be among them."""
    tokens = random_tokens()
    gradients = []
    for decided in (True, False):
        model = shard_tensor_parallel(small_model(torch.float32))
        recompute_blocks(model.blocks, mode)  # type: ignore[arg-type]
        cpu_products.onednn_works.cache_clear()
        if decided:
            cpu_products.onednn_works()
        model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())
