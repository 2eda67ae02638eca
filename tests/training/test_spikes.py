"""The spike rule: what is one, what is none, bounds, and a state that a checkpoint keeps."""

import math
import random

from argonne.training.spikes import LEAST, WINDOW, SpikeRule


def falling(step: int, generator: random.Random) -> dict[str, float]:
    loss = 2.5 + 6 * math.exp(-step / 300) + generator.gauss(0, 0.05)
    return {"loss": loss, "grad_norm": 1 + abs(generator.gauss(0, 0.2))}


def test_an_ordinary_run_has_no_spike() -> None:
    generator, rule = random.Random(1), SpikeRule()
    assert all(rule.judge(falling(step, generator)) is None for step in range(5000))


def test_a_spike_is_named_and_does_not_raise_the_threshold() -> None:
    generator, rule = random.Random(2), SpikeRule()
    for step in range(1000):
        rule.judge(falling(step, generator))
    first = rule.judge({"loss": 6.0, "grad_norm": 1.0})
    second = rule.judge({"loss": 2.7, "grad_norm": 40.0})
    assert (
        first is not None and (first.quantity, first.value) == ("loss", 6.0) and 2.6 < first.threshold < 6.0
    )
    assert second is not None and second.quantity == "grad_norm"
    again = rule.judge({"loss": 6.0, "grad_norm": 1.0})
    assert again is not None and again.threshold == first.threshold


def test_a_flat_curve_does_not_make_noise_a_spike() -> None:
    rule = SpikeRule()
    for _ in range(WINDOW):
        rule.judge({"loss": 2.0, "grad_norm": 1.0})
    assert rule.judge({"loss": 2.1, "grad_norm": 1.05}) is None
    assert rule.judge({"loss": 2.3, "grad_norm": 1.0}) is not None


def test_the_first_steps_and_values_that_are_not_finite_are_not_judged() -> None:
    rule = SpikeRule()
    for _ in range(LEAST - 1):
        assert rule.judge({"loss": 1.0, "grad_norm": 1.0}) is None
    assert rule.judge({"loss": 99.0, "grad_norm": 1.0}) is None
    for _ in range(LEAST):
        rule.judge({"loss": 1.0, "grad_norm": 1.0})
    assert rule.judge({"loss": math.nan, "grad_norm": math.inf}) is None


def test_a_run_that_spikes_all_the_time_is_left_alone() -> None:
    rule = SpikeRule(most=3)
    for _ in range(WINDOW):
        rule.judge({"loss": 1.0, "grad_norm": 1.0})
    found = [rule.judge({"loss": 9.0, "grad_norm": 1.0}) is not None for _ in range(20)]
    assert found == [True] * 3 + [False] * 17


def test_a_resumed_rule_judges_as_the_unbroken_one() -> None:
    generator, rule = random.Random(3), SpikeRule()
    for step in range(300):
        rule.judge(falling(step, generator))
    resumed = SpikeRule()
    resumed.load_state_dict(rule.state_dict())
    for step in range(300, 600):
        values = falling(step, generator) if step % 50 else {"loss": 30.0, "grad_norm": 1.0}
        assert rule.judge(values) == resumed.judge(values)
