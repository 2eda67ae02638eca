"""The predicted step against the arithmetic of gpu_predictions: Argonne 2.0, 4,096 tokens, H100s at assumed
rates. Nothing is timed."""

from dataclasses import replace
from typing import Any

import pytest

from argonne.config.devices import DEVICE_BYTES, PEAK_FLOPS
from argonne.config.presets import PRESETS
from argonne.tp.costs import ModelOutline
from argonne.tp.device_rates import RATES, device_rates
from argonne.tp.plan_memory import Layout
from argonne.tp.plan_time import StepPrediction, StepTime
from argonne.tp.shape_only import shape_only

MODEL = shape_only({**PRESETS["argonne-2.0"], "vocab_size": 151_665})
OUTLINE = ModelOutline.of(MODEL)
UNFUSED = 250e9
"""Bytes of a micro-batch at tp 8 that fused norms have saved since the table was made (283 -> 33 GB); norms
of the whole residual stream move as many at every degree."""


def step(tp_size: int = 8, dp_size: int = 1, *, device: str = "H100", **changes: Any) -> StepTime:
    options = {"batch_size": 4, "block_size": 4096, **changes}
    node_size = options.pop("node_size", 8)
    layout = Layout(tp_size=tp_size, dp_size=dp_size, **options)
    return StepPrediction(OUTLINE, MODEL, layout, RATES[device], node_size=node_size).time()


def before_fused_norms(time: StepTime, micro_batches: int) -> float:
    return time.total + micro_batches * UNFUSED / RATES["H100"].memory


def test_the_parts_of_the_table() -> None:
    """Milliseconds at tp 8, eager, as the table has them."""
    parts = {name: 1e3 * seconds for name, seconds in step().parts().items()}
    assert parts["products"] == pytest.approx(86, rel=0.02)
    assert parts["misaligned"] == pytest.approx(19, rel=0.05)
    assert parts["attention"] == pytest.approx(22, rel=0.05)
    assert parts["tensor_parallel"] == pytest.approx(31 + 12, rel=0.06)
    assert parts["optimizer"] == pytest.approx(9, rel=0.05)
    assert parts["waiting"] == 5
    assert parts["elementwise"] == pytest.approx(142.8e9 / 2.8e12 * 1e3, rel=0.02)
    assert 1e3 * before_fused_norms(step(), 1) == pytest.approx(320, rel=0.03)


@pytest.mark.parametrize(("tp_size", "gain"), [(4, 1.44), (2, 1.85)])
def test_the_ratios_at_global_batch_16(tp_size: int, gain: float) -> None:
    """As predicted before norms were fused; with fused ones all layouts gain, the slowest most."""
    dp_size = 8 // tp_size
    default, other = step(accumulation=4), step(tp_size, dp_size, accumulation=4 // dp_size)
    before = before_fused_norms(default, 4) / before_fused_norms(other, 4 // dp_size)
    assert before == pytest.approx(gain, rel=0.06)
    assert 1 < default.total / other.total < before


def test_what_costs_more_takes_longer() -> None:
    usual = step().total
    assert step(batch_size=8).total > usual and step(accumulation=2).total > usual
    assert step(recomputation="full").total > step(recomputation="selective").total > usual
    assert step(block_size=8192, batch_size=2).total > usual  # the same tokens, more attention
    assert step(node_size=4).tensor_parallel > step().tensor_parallel  # over the network


def test_replicas() -> None:
    assert step().replicas == 0
    sharded = step(2, 4)
    assert 0 < step(2, 4, keeps_gathered=True).replicas <= sharded.replicas
    across, within = step(2, 8), step(2, 8, shard_size=4)
    assert within.replicas < across.replicas  # gathers stay within a node
    assert within.optimizer > across.optimizer  # which then holds a quarter, not an eighth
    assert step(2, 8, fsdp=False).optimizer > within.optimizer


def test_faster_devices_are_faster_and_every_name_has_rates() -> None:
    assert set(RATES) == set(DEVICE_BYTES) == set(PEAK_FLOPS)
    times = [step(device=name).total for name in ("A100-80GB", "H100", "H200", "B200")]
    assert times == sorted(times, reverse=True) and len(set(times)) == 4
    for name, rates in RATES.items():
        assert 0.5 < rates.products / PEAK_FLOPS[name] < 0.8
    assert device_rates("NVIDIA A100-SXM4-80GB") is RATES["A100-80GB"]
    assert device_rates("NVIDIA H200") is RATES["H200"]
    assert device_rates("12345") is RATES["H100"]


def test_an_aligned_width_costs_nothing() -> None:
    assert step(2, 4).misaligned == 0 < step(4, 2).misaligned  # 2040 / 680 features, and 1020 / 340


def test_the_teacher_and_unequal_shares_are_counted() -> None:
    layout = Layout(tp_size=8, batch_size=4, block_size=4096)
    plain = StepPrediction(OUTLINE, MODEL, layout, RATES["H100"], node_size=8).time()
    more = StepPrediction(
        OUTLINE, MODEL, replace(layout, accumulation=2), RATES["H100"], node_size=8, imbalance=1.5,
        teacher_flops=7e12,
    ).time()  # fmt: skip
    assert more.products == pytest.approx(3 * plain.products)
    assert more.teacher == pytest.approx(0.02)
