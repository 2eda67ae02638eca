"""The page of the GPU's runs: what is compared, what is left out, what fails; the whole of it on the CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from argonne.benchmarks import gpu_runs
from argonne.benchmarks.common import Row
from argonne.benchmarks.gpu_bench import Bench, Measured, NotHere, Part, check_row, plan_device, rank_pids
from argonne.benchmarks.gpu_layouts import cases, decisions, degrees, step_rows, step_samples
from argonne.config.command_line import parse_recipe
from argonne.config.presets import PRESETS, REFERENCE
from argonne.errors import RunError
from argonne.testing.launch import ROOT


def bench_of(folder: Path, devices: int, *, on_gpu: bool = True) -> Bench:
    return Bench(folder=folder, devices=devices, on_gpu=on_gpu, device="H100", batch=4, block=4096, steps=5,
                 layers=24)  # fmt: skip


def measured(seconds: float, predicted: float = 0.2, **changes: Any) -> Measured:
    plan = {"predicted_step_seconds": {"total": predicted}, "bytes_per_rank": {"total": 20_000_000_000}}
    values = {"seconds": [seconds] * 3, "peak": 0, "reserved": 0, "used": 0, "mfu": None,
              "plan": plan, "stdout": ""}  # fmt: skip
    return Measured(**{**values, **changes})


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "25000000000"),
    ],
)
def test_the_plan_knows_the_device(name: str, known: str) -> None:
    assert plan_device(name, 25_000_000_000) == known


@pytest.mark.parametrize(
    ("devices", "expected", "samples"), [(8, [8, 4, 2], 16), (2, [2, 1], 8), (1, [1], 8), (6, [6, 3], 8)]
)
def test_layouts_compared_at_the_same_tokens_a_step(
    devices: int, expected: list[int], samples: int, tmp_path: Path
) -> None:
    bench = bench_of(tmp_path, devices)
    assert degrees(devices) == expected
    assert step_samples(bench) == samples
    bench.model.write_text(json.dumps({**PRESETS[REFERENCE], "vocab_size": 1000}))
    found = list(cases(bench))
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    for case in found:
        recipe = parse_recipe([*bench.flags(*case.flags, "--output-dir", tmp_path), "--total-steps", "3"])
        training = recipe.config.training
        if "one micro-batch" in case.name:
            assert training.global_batch_size is None
        else:
            assert training.global_batch_size == samples
        size = recipe.config.parallel.tensor_parallel_size
        assert size in expected and samples % (bench.batch * devices // int(size)) == 0
    assert any("sequence parallel" in name for name in names) == (devices > 1)


def test_what_is_measured_stands_beside_the_prediction(tmp_path: Path) -> None:
    (case, *_) = cases(bench_of(tmp_path, 8))
    bytes_seen = {"peak": 22_000_000_000, "reserved": 23_500_000_000, "used": 25_000_000_000}
    time, memory = step_rows(case, measured(0.3, mfu=0.21, **bytes_seen))
    assert (time.ours, time.peer, time.ratio) == (0.3, 0.2, pytest.approx(1.5)) and time.note == "MFU 21.0%"
    assert memory.met is False and memory.note == "23.5 GB reserved, 25.0 GB in use on the device"


def test_decisions_follow_from_the_factors(tmp_path: Path) -> None:
    runs = {
        "tp 8": measured(0.30, 0.2),
        "tp 8, compiled": measured(0.20, 0.2),
        "tp 8, widths as they are": measured(0.301, 0.2),
        "tp 2 x dp 4": measured(0.25, 0.1),
        "tp 8, one micro-batch a step": measured(0.05, 0.05),
    }
    lines = decisions(bench_of(tmp_path, 8), runs)
    assert lines == [
        "Default: --compile makes tp 8 1.50 times as fast: worth being the default",
        "Default: --pad-widths on makes tp 8, widths as they are 1.00 times as fast: "
        "not worth being the default",
        "Fastest measured: tp 8, compiled; by the plan: tp 2 x dp 4 (it does not model --compile)",
    ]


def test_a_part_that_fails_is_a_failed_check_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def not_here() -> Part:
        raise NotHere("one device has no peer to lose")

    def failing() -> Part:
        raise RunError("the gradients differ")

    def broken() -> Part:
        raise KeyError("loss")

    page = Part()
    page.attempt("faults", not_here)
    page.attempt("gradients", failing)
    page.attempt("a trace", broken)
    page.attempt("steps", lambda: Part(rows=[Row(name="step", ours=1.0, peer=2.0, unit="s")]))
    assert [(row.name, row.met) for row in page.rows] == [
        ("gradients (1: yes)", False),
        ("a trace (1: yes)", False),
        ("step", None),
    ]
    assert page.remarks == [
        "Left out: faults: one device has no peer to lose",
        "FAILED: gradients: the gradients differ",
        "FAILED: a trace: KeyError: 'loss'",
    ]
    assert "KeyError" in capsys.readouterr().err
    assert check_row("it holds", True).met


def test_ranks_are_found_by_their_environment() -> None:
    child = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    program = (
        "import os, subprocess, sys\n"
        f"ranks = [subprocess.Popen({child!r}, env={{**os.environ, 'RANK': str(r)}}) for r in range(2)]\n"
        "print(*[rank.pid for rank in ranks], flush=True)\n"
        "[rank.wait() for rank in ranks]"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert rank_pids(process) == dict(enumerate(pids))
        process.stdin.close()


def test_a_shape_that_never_fits_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = {24: False, 18: False, 13: True}

    def plan(self: Bench, *flags: Any) -> dict[str, Any]:
        return {"fits": fits.get(self.layers, False)}

    monkeypatch.setattr(Bench, "plan", plan)
    bench = bench_of(tmp_path, 1)
    bench.model.write_text("{}")
    assert bench.deepest().layers == 13
    fits.clear()
    with pytest.raises(RunError, match="not even two layers fit on 1 x H100"):
        bench.deepest()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("devices", [1, 2])
def test_the_whole_page_on_the_cpu(devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_runs, "CPU_PROCESSES", devices)
    report = gpu_runs.run(2, "cpu")
    assert report.remarks[0] == "Every check held.", report.remarks
    left_out = [remark for remark in report.remarks if remark.startswith("Left out")]
    assert len(left_out) == (1 if devices == 1 else 0)
    names = " | ".join(row.name for row in report.rows)
    for what in ("step, tp", "--verify-sharding", "exposed communication", "held up by a save", "resumed"):
        assert what in names
    assert ("rank 1 killed" in names) == ("bus bandwidth" in names) == (devices == 2)
    assert list(tmp_path.iterdir()) == []
    assert str(ROOT) not in " ".join(report.remarks)
