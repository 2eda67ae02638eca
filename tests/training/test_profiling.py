"""Profiles: shares of a timeline, a real trace on the CPU; the garbage collector stays out of steps."""

import gc
import json
from pathlib import Path

import pytest
import torch

from argonne.training.profiling import GarbageControl, StepProfiler, merged, shares


def test_union_of_intervals() -> None:
    assert merged([(5, 7), (0, 2), (1, 3), (7, 8)]) == [(0, 3), (5, 8)]


def test_shares_of_a_timeline() -> None:
    # 0-4 computing, 3-6 communicating (two of it exposed), 6-8 nothing, 8-10 computing
    found = shares([(0, 4), (8, 10)], [(3, 6)])
    assert (found.compute, found.exposed_communication) == pytest.approx((0.6, 0.2))
    assert found.idle == pytest.approx(0.2)
    assert found.line() == "compute 60.0%, exposed communication 20.0%, idle 20.0%"
    assert shares([], []).idle == 1.0


def test_a_trace_of_the_named_steps(tmp_path: Path) -> None:
    profiler = StepProfiler("2:2", folder=tmp_path / "profile", rank=3, device=torch.device("cpu"))
    lines = []
    for step in range(1, 6):
        profiler.before_step(step)
        torch.randn(64, 64) @ torch.randn(64, 64)
        lines.append(profiler.after_step(step))
    assert [line is not None for line in lines] == [False, False, True, False, False]
    assert lines[2] is not None and lines[2].startswith("Profile of steps 2 to 3 (rank 3): compute ")
    trace = json.loads((tmp_path / "profile" / "trace_rank_3.json").read_text())
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(products) == 2


def test_nothing_is_profiled_unless_asked(tmp_path: Path) -> None:
    profiler = StepProfiler(None, folder=tmp_path / "profile", rank=0, device=torch.device("cpu"))
    profiler.before_step(1)
    assert profiler.after_step(1) is None and not (tmp_path / "profile").exists()


def test_the_collector_runs_between_steps_only() -> None:
    control, found = GarbageControl(), []
    gc.callbacks.append(lambda phase, info: found.append(info["generation"]) if phase == "start" else None)
    try:
        control.begin()
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        found.clear()
        rings = []
        for step in range(1, 1000):
            ring: list[object] = []
            ring.append(ring)
            rings.append(ring)
            control.after_step(step)
        assert found == []
        control.after_step(1000)
        assert found == [1]
    finally:
        gc.callbacks.pop()
        control.end()
    assert gc.isenabled() and gc.get_freeze_count() == 0
