"""Learning rates: by hand, against torch's own schedulers, and those of the family's trainer."""

import json
import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from argonne.config.derived import derive_steps
from argonne.config.options import TrainingOptions
from argonne.errors import ConfigError
from argonne.training.schedule import Schedule
from tests import FIXTURES

PEAK, MINIMUM = 1e-3, 1e-4


def schedule(kind: str, **lengths: int) -> Schedule:
    return Schedule(
        kind=kind, peak=PEAK, minimum=MINIMUM, **{"warmup_steps": 10, "total_steps": 110, **lengths}
    )


def test_cosine() -> None:
    """Linear from the minimum to the peak, cosine down to the minimum, where it stays."""
    rate = schedule("cosine").rate
    assert rate(0) == 1e-4
    assert rate(5) == pytest.approx(5.5e-4)
    assert rate(10) == 1e-3
    assert rate(60) == pytest.approx(5.5e-4)
    assert rate(35) == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(110) == rate(111) == rate(10**9) == pytest.approx(1e-4)
    rising = [rate(step) for step in range(11)]
    falling = [rate(step) for step in range(10, 111)]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert schedule("cosine", warmup_steps=0).rate(0) == 1e-3
    ended_warming = schedule("cosine", warmup_steps=5, total_steps=4).rate
    assert ended_warming(3) < 1e-3 and ended_warming(5) == 1e-3


def test_wsd() -> None:
    rate = schedule("wsd", cooldown_steps=20).rate
    assert rate(0) == 1e-4 and rate(5) == pytest.approx(5.5e-4, rel=1e-12)
    assert {rate(step) for step in range(10, 91)} == {1e-3}
    assert rate(91) == pytest.approx(1e-3 - 9e-4 / 20, rel=1e-12)
    assert rate(100) == pytest.approx(5.5e-4, rel=1e-12)
    assert rate(110) == rate(500) == pytest.approx(1e-4, rel=1e-12)


def test_a_cooldown_begins_after_the_warm_up_at_the_earliest() -> None:
    rate = schedule("wsd", cooldown_steps=110).rate
    assert rate(10) == 1e-3 and rate(65) == pytest.approx(1e-3 - 9e-4 * 55 / 110, rel=1e-12)
    assert {schedule("wsd", cooldown_steps=0).rate(step) for step in range(10, 111)} == {1e-3}


def test_linear_and_constant() -> None:
    rate = schedule("linear").rate
    assert rate(10) == 1e-3 and rate(35) == pytest.approx(7.75e-4, rel=1e-12)
    assert rate(110) == rate(111) == pytest.approx(1e-4, rel=1e-12)
    rate = schedule("constant").rate
    assert rate(5) == pytest.approx(5.5e-4, rel=1e-12)
    assert {rate(step) for step in (10, 60, 110, 10**6)} == {1e-3}


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_rates_are_torchs(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    warm_up = LinearLR(optimizer, start_factor=MINIMUM / PEAK, total_iters=10)
    fall: Any = CosineAnnealingLR(optimizer, T_max=100, eta_min=MINIMUM)
    if kind == "linear":
        fall = LinearLR(optimizer, start_factor=1.0, end_factor=MINIMUM / PEAK, total_iters=100)
    theirs = SequentialLR(optimizer, [warm_up, fall], milestones=[10])
    for step in range(110):
        assert schedule(kind).rate(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        theirs.step()


def test_rates_are_those_of_the_familys_trainer() -> None:
    facts = json.loads((FIXTURES / "family_checkpoint_step_20.json").read_text())
    theirs = facts["hyperparameters"]
    ours = Schedule(
        kind="wsd",
        peak=theirs["lr"],
        minimum=theirs["min_lr"],
        warmup_steps=theirs["warmup"],
        total_steps=theirs["total"],
        cooldown_steps=theirs["cool"],
    )
    for step, rate in enumerate(facts["learning_rates"], start=facts["global_step"]):
        assert abs(ours.rate(step) - rate) < 1e-9, step


def derived(samples_per_step: int = 4, **options: Any) -> TrainingOptions:
    return derive_steps(TrainingOptions(block_size=16, **options), samples_per_step)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (64, 1), (65, 2), (6400, 100), (6401, 101)])
def test_tokens_make_steps_rounded_up(tokens: int, steps: int) -> None:
    assert derived(total_tokens=tokens).total_steps == steps
    assert derived(samples_per_step=8, total_tokens=2 * tokens).total_steps == steps


@pytest.mark.parametrize(
    ("fraction", "steps", "cooldown"),
    [(0.1, 109, 10), (0.29, 100, 29), (0.0, 100, 0), (1.0, 7, 7), (0.57, 100, 57), (0.2, 4, 0)],
)
def test_a_fraction_of_the_steps_is_rounded_down_as_it_is_written(
    fraction: float, steps: int, cooldown: int
) -> None:
    """In floating point 0.29 and 0.57 of 100 are a step less."""
    options = derived(lr_schedule="wsd", cooldown_fraction=fraction, total_steps=steps)
    assert options.cooldown_steps == cooldown == Schedule.of(options).cooldown_steps


def test_lengths_that_the_tokens_cannot_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="--cooldown-steps 5 exceeds the 4 steps of --total-tokens 256"):
        derived(lr_schedule="wsd", cooldown_steps=5, total_tokens=256)
    with pytest.raises(ConfigError, match="--warmup-steps 5 exceeds the 4 steps of --total-tokens 256"):
        derived(warmup_steps=5, total_tokens=256)
    assert derived(total_tokens=256).warmup_steps == 2000  # the default, within which a short run may end


def test_a_schedule_says_what_it_is() -> None:
    options = TrainingOptions(lr_schedule="wsd", cooldown_steps=1000, total_steps=20000)
    assert (
        str(Schedule.of(options))
        == "wsd, 0.0001 to 1e-05 over 20,000 steps, 2,000 of warm-up, 1,000 of cooldown"
    )
