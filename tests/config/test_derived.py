"""Accumulation and lengths of a schedule, worked out by hand."""

from typing import Any

import pytest

from argonne.config.derived import derive_accumulation, derive_steps, schedule_problems
from argonne.config.options import TrainingOptions
from argonne.errors import ConfigError


def options(**given: Any) -> TrainingOptions:
    return TrainingOptions(**{"batch_size": 4, "block_size": 10, "warmup_steps": 0, **given})


@pytest.mark.parametrize(
    ("given", "dp_size", "accumulation"),
    [
        ({}, 3, 1),
        ({"gradient_accumulation_steps": 5}, 3, 5),
        ({"global_batch_size": 24}, 3, 2),
        ({"global_batch_size": 24}, 1, 6),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 2}, 3, 2),
    ],
)
def test_the_global_batch_makes_the_accumulation(given: Any, dp_size: int, accumulation: int) -> None:
    assert derive_accumulation(options(**given), dp_size) == accumulation


@pytest.mark.parametrize(("size", "dp_size"), [(25, 3), (12, 6), (4, 2)])
def test_a_global_batch_that_micro_batches_do_not_fill(size: int, dp_size: int) -> None:
    micro = 4 * dp_size
    said = (
        f"--global-batch-size {size} is not a multiple of --batch-size 4 x {dp_size} model replicas = {micro}"
    )
    with pytest.raises(ConfigError, match=rf"{said}: use a multiple of {micro}$"):
        derive_accumulation(options(global_batch_size=size), dp_size)


def test_an_accumulation_beside_the_global_batch_must_be_its_own() -> None:
    given = options(global_batch_size=24, gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match=r"needs 2 micro-batches .* is 3: leave it out"):
        derive_accumulation(given, 3)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (60, 1), (61, 2), (6000, 100), (5941, 100)])
def test_tokens_are_rounded_up_to_a_step(tokens: int, steps: int) -> None:
    assert derive_steps(options(total_tokens=tokens, total_steps=7), 6).total_steps == steps


@pytest.mark.parametrize(
    ("fraction", "total", "steps"), [(0.29, 100, 29), (0.1, 19, 1), (0.0, 10, 0), (1.0, 10, 10), (0.7, 10, 7)]
)
def test_a_fraction_is_exact_and_rounded_down(fraction: float, total: int, steps: int) -> None:
    assert derive_steps(options(cooldown_fraction=fraction, total_steps=total), 1).cooldown_steps == steps


def test_a_fraction_is_of_the_steps_that_tokens_make() -> None:
    found = derive_steps(options(total_tokens=1200, cooldown_fraction=0.25), 6)
    assert (found.total_steps, found.cooldown_steps) == (20, 5)


def test_lengths_beyond_the_schedule_are_all_named() -> None:
    given = options(total_steps=9, warmup_steps=10, cooldown_steps=11)
    assert [problem.split(":")[0] for problem in schedule_problems(given)] == [
        "--warmup-steps 10 exceeds --total-steps 9",
        "--cooldown-steps 11 exceeds --total-steps 9",
    ]
    said = r"--warmup-steps 10 exceeds the 2 steps of --total-tokens 120: .*; --cooldown-steps 11 exceeds"
    with pytest.raises(ConfigError, match=said):
        derive_steps(options(total_tokens=120, warmup_steps=10, cooldown_steps=11), 6)
    assert schedule_problems(options(total_steps=9, warmup_steps=9, cooldown_steps=9)) == []


def test_a_short_run_may_end_within_the_default_warm_up() -> None:
    assert schedule_problems(options(total_steps=9, warmup_steps=TrainingOptions.warmup_steps)) == []
