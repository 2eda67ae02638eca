"""Clipping, AdamW, loss scale and the non-finite rule, against torch's own and by hand."""

import math

import pytest
import torch
from torch import Tensor

from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.tp.architectures import ARGONNE_PLAN
from argonne.tp.plan import build_slice_map
from argonne.tp.slices import SliceMap
from argonne.training.optimizer import (
    GradientTotals,
    LossScaler,
    NonFiniteRule,
    build_adamw,
    scale_gradients,
    set_learning_rate,
)


def gradients_and_map() -> tuple[dict[str, Tensor], SliceMap]:
    model = small_model(torch.float32)
    loss_of(model, random_tokens()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, build_slice_map(model, ARGONNE_PLAN, 1)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_clipping_is_torchs(scale: float, max_norm: float) -> None:
    """Also with a loss scale in the gradients, and not at all with 0."""
    gradients, slice_map = gradients_and_map()
    reference = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in gradients.values()]
    for parameter, grad in zip(reference, gradients.values(), strict=True):
        parameter.grad = grad.clone()
        grad.mul_(scale)
    norm = torch.nn.utils.clip_grad_norm_(reference, max_norm or math.inf)
    on_device = GradientTotals(slice_map, 0, None).reduce(
        gradients, loss_share=torch.tensor(2.5), votes=[0.0, 1.0], scale=scale
    )
    totals = on_device.read()
    assert totals.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert (totals.loss, totals.votes, totals.finite) == (2.5, (0.0, 1.0), True)
    scale_gradients(gradients, on_device.factor(max_norm))
    for grad, parameter in zip(gradients.values(), reference, strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_seen(value: float) -> None:
    gradients, slice_map = gradients_and_map()
    gradients["norm.weight"][3] = value
    on_device = GradientTotals(slice_map, 0, None).reduce(
        gradients, loss_share=torch.tensor(1.0), votes=[1.0], scale=2.0
    )
    totals = on_device.read()
    assert on_device.not_finite() == 1
    assert not totals.finite and totals.votes == (1.0,)
    clean, _ = gradients_and_map()
    on_device = GradientTotals(slice_map, 0, None).reduce(clean, loss_share=torch.tensor(value))
    totals = on_device.read()
    assert on_device.not_finite() == 1
    assert not totals.finite and math.isfinite(totals.grad_norm)


def test_adamw_is_torchs() -> None:
    """The same steps as a plain one, and state of the same form from the start."""
    ours, theirs = small_model(torch.float32), small_model(torch.float32)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = build_adamw(
        dict(ours.named_parameters()),
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        device=torch.device("cpu"),
    )
    plain = torch.optim.AdamW(theirs.parameters(), **settings)  # type: ignore[arg-type]
    for step in range(4):
        for one, model in ((optimizer, ours), (plain, theirs)):
            set_learning_rate(one, 1e-3 / (step + 1))
            one.zero_grad()
            loss_of(model, random_tokens(seed=step)).backward()
            one.step()
    mine, others = optimizer.state_dict(), plain.state_dict()
    assert mine["state"].keys() == others["state"].keys()
    for index, state in others["state"].items():
        assert mine["state"][index].keys() == state.keys()
        assert mine["state"][index]["step"] == state["step"] == 4
        for key in ("exp_avg", "exp_avg_sq"):
            assert relative_error(mine["state"][index][key], state[key]) < 1e-4
    for weight, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(weight.detach(), expected.detach()) < 1e-5


def test_loss_scale_goes_as_torchs() -> None:
    """Halved by a non-finite step, doubled after so many finite ones in a row; resumed exactly."""
    ours = LossScaler(enabled=True, initial_scale=1024.0, growth_interval=3)
    scale, tracker = torch.tensor([1024.0]), torch.tensor([0], dtype=torch.int32)
    history = [True, True, False, True, True, True, True, False, False, True, True, True, True, True, True]
    for number, finite in enumerate(history):
        if number == 9:
            again = LossScaler(enabled=True, growth_interval=3)
            again.load_state_dict(ours.state_dict())
            ours = again
        ours.update(finite)
        torch._amp_update_scale_(scale, tracker, torch.tensor([0.0 if finite else 1.0]), 2.0, 0.5, 3)
        assert ours.scale == scale.item(), number
    off = LossScaler(enabled=False)
    off.update(False)
    off.load_state_dict({"scale": 8.0, "finite_steps": 1})
    assert off.scale == 1.0


def test_the_scale_has_a_floor() -> None:
    scaler = LossScaler(enabled=True)
    for _ in range(200):
        scaler.update(False)
    assert scaler.scale == 2.0**-24


def test_skipped_steps_in_a_row_end_the_run() -> None:
    rule = NonFiniteRule(limit=3)
    assert [rule.record(skipped=s) for s in (True, True, False, True, True, True)] == [False] * 5 + [True]
    assert rule.total == 5
