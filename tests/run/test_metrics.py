"""training_metrics.jsonl: what a resume keeps, torn lines, disks that fail; and the peaks of devices."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import argonne.run.metrics as run_metrics
from argonne.run.metrics import MetricsFile, peak_flops


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "training_metrics.jsonl"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, *steps: int, first_step: int = 0) -> list[str]:
    """Write a line for each step; the warnings."""
    warnings: list[str] = []
    metrics = MetricsFile(path, first_step, warnings.append)
    for step in steps:
        metrics.write({"step": step})
    metrics.close()
    return warnings


def test_each_line_is_there_at_once(path: Path) -> None:
    metrics = MetricsFile(path, 0, pytest.fail)
    for step in (1, 2):
        metrics.write({"step": step, "loss": float("nan"), "names": ("a", "b")})
        assert lines_of(path)[-1] == {"step": step, "loss": None, "names": ["a", "b"]}
    metrics.close()
    metrics.close()
    metrics.write({"step": 3})
    assert len(lines_of(path)) == 2


@pytest.mark.parametrize(
    ("first_step", "kept"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])]
)
def test_a_resume_keeps_the_lines_up_to_its_step(path: Path, first_step: int, kept: list[int]) -> None:
    written(path, 1, 2, 3)
    assert written(path, first_step + 1, first_step=first_step) == []
    assert [line["step"] for line in lines_of(path)] == [*kept, first_step + 1]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "torn", ['{"step": 2', '{"step": 2}', "[2]\n", '"step"\n', '{"step": "2"}\n', "{}\n", "\n", "\x00\n"]
)
def test_what_is_no_whole_line_of_ours_is_dropped(path: Path, torn: str) -> None:
    path.write_text('{"step": 1}\n' + torn)
    written(path, 3, first_step=2)
    assert [line["step"] for line in lines_of(path)] == [1, 3]


def test_a_resume_that_dies_while_it_rewrites_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(path, 1, 2, 3)
    before = path.read_bytes()

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_metrics.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, 1, pytest.fail)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_opened_costs_the_metrics_only(path: Path) -> None:
    path.mkdir()
    (warning,) = written(path, 1, 2)
    assert str(path) in warning and "the run goes on without these metrics" in warning


def test_a_full_disk_costs_no_step_and_no_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half a line and then nothing, for a while."""
    warnings: list[str] = []
    metrics = MetricsFile(path, 0, warnings.append)
    metrics.write({"step": 1})
    real = os.write
    monkeypatch.setattr(run_metrics.os, "write", lambda file, data: real(file, data[: len(data) // 2]))
    metrics.write({"step": 2})
    metrics.write({"step": 3})
    assert lines_of(path) == [{"step": 1}] and len(warnings) == 2
    monkeypatch.setattr(run_metrics.os, "write", real)
    metrics.write({"step": 4})
    metrics.close()
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4]


def test_no_more_than_so_many_lines_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a day must not fill the memory; the newest lines are kept."""
    monkeypatch.setattr(MetricsFile, "WAITING", 3)
    metrics = MetricsFile(path, 0, lambda warning: None)
    real = os.write
    monkeypatch.setattr(run_metrics.os, "write", lambda file, data: 0)
    for step in range(1, 7):
        metrics.write({"step": step})
    monkeypatch.setattr(run_metrics.os, "write", real)
    metrics.write({"step": 7})
    metrics.close()
    assert [line["step"] for line in lines_of(path)] == [5, 6, 7]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H20", 148e12),
        ("AMD Instinct MI300X", 1307e12),
        ("cpu", None),
        ("Some GPU of tomorrow", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name, "bf16") == peak
    assert peak_flops(name, "fp32") is None
