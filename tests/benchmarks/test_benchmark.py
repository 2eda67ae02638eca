"""The benchmarks' own logic: ratios, targets, tables, and the GPU's parts on a tiny model on the CPU."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
import torch.distributed as dist

from argonne.benchmarks.common import Report, Row, as_markdown, as_text, fill_tables, timed_row, write
from argonne.errors import DataError, DeviceError
from argonne.testing.launch import ROOT


def test_minima_are_compared_and_rounds_give_the_spread() -> None:
    row = timed_row("a", [2.0, 3.0], [4.0, 5.0], target=0.5)
    assert row.ratio == 0.5 and row.spread == (0.5, 0.6) and row.met
    row = timed_row("b", [2.0, 3.0], [3.0, 6.0], inverse=True, at_least=True, target=1.75)
    assert row.ratio == 1.5 and row.spread == (1.5, 2.0) and row.met is False
    row = timed_row("c", [1.5, 1.2], [1.0, 1.1], difference=True, target=0.25)
    assert row.ratio == pytest.approx(0.2) and row.spread == pytest.approx((0.1, 0.5)) and row.met
    assert Row(name="d", ours=1, peer=2, unit="").met is None


def test_tables_and_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = (
        timed_row("step", [0.2], [0.4], target=0.75),
        timed_row("start", [2.0], [1.0], difference=True, target=0.5),
    )
    report = Report(name="step", title="A title", rows=rows, remarks=("a remark",), data={"x": [1]})
    assert "met" in as_text(report) and "missed" in as_text(report)
    markdown = as_markdown(report)
    assert "| step | 200.0 ms | 400.0 ms | 0.500 | 0.50 to 0.50 | <= 0.75 | met |" in markdown
    assert "| +1.000 s | +1.00 s to +1.00 s | <= 0.5 s | missed |" in markdown
    paths = write(report, tmp_path)
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert json.loads(paths[0].read_text())["rows"][1]["met"] is False

    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- step: begin -->\nold\n<!-- step: end -->\nafter\n")
    fill_tables(document, tmp_path, ["step"])
    assert document.read_text() == f"before\n<!-- step: begin -->\n{markdown}<!-- step: end -->\nafter\n"
    with pytest.raises(DataError, match="no markers"):
        fill_tables(document, tmp_path, ["data"])


def test_the_document_has_a_place_for_every_table() -> None:
    text = benchmark.DOCUMENT.read_text(encoding="utf-8")
    for part in benchmark.PARTS:
        assert f"<!-- {part}: begin -->\n" in text and f"<!-- {part}: end -->" in text


@pytest.mark.slow
def test_counted_parts_meet_their_targets() -> None:
    for part in ("memory", "collectives"):
        rows = importlib.import_module(benchmark.PARTS[part]).run(1).rows
        assert rows and all(row.met is not False for row in rows), part


def test_the_share_of_a_rank_runs_without_its_peers() -> None:
    gpu = importlib.import_module("argonne.benchmarks.gpu")
    parallel = gpu.fake_world(torch.device("cpu"))
    try:
        for sequence_parallel in (False, True):
            measured = gpu.measure_step(gpu.TINY, parallel, 1, sequence_parallel=sequence_parallel)
            assert len(measured.seconds) == 1 and measured.expected_bytes > 0 and measured.flops > 0
    finally:
        dist.destroy_process_group()
    rows, data = gpu.attention_rows(gpu.TINY, torch.device("cpu"), 1)
    assert len(rows) == 6 and set(data) == {"170", "176", "192", "128"}


def test_padded_heads_give_the_same_attention() -> None:
    attention: Any = importlib.import_module("argonne.benchmarks.gpu_attention")
    shape = importlib.import_module("argonne.benchmarks.gpu").TINY
    outputs = []
    for head_dim in (170, 176):
        torch.manual_seed(0)
        half = attention._Half(shape, head_dim, torch.device("cpu"), 8)
        outputs.append(half.attend(*half.heads_of())[..., :170])
        half.whole()
        gradient = half.weights[0].grad.view(-1, head_dim, shape.hidden_size)
        assert not gradient[:, 170:].any()
    torch.testing.assert_close(outputs[0], outputs[1])


def test_a_part_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(part: str, rounds: int, device: str) -> Report:
        if part == "data":
            raise ValueError("a fault of the benchmark")
        return Report(
            name=part, title=f"Table of {part}", rows=(Row(name="row", ours=1.0, peer=2.0, unit="s"),)
        )

    parts = [part for part in benchmark.PARTS if part not in benchmark.ON_GPUS]
    document = tmp_path / "performance.md"
    document.write_text("".join(f"<!-- {part}: begin -->\nold\n<!-- {part}: end -->\n" for part in parts))
    monkeypatch.setattr(benchmark, "run_part", run_part)
    monkeypatch.setattr(benchmark, "DOCUMENT", document)
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    assert benchmark.main(["all", "--output-dir", str(tmp_path / "out")]) == 1
    stderr = capsys.readouterr().err
    assert "ValueError: a fault of the benchmark" in stderr
    assert stderr.endswith("error: not measured, for the reasons above: data\n")
    text = document.read_text()
    assert text.count("old") == 1 and "data: begin -->\nold\n" in text
    assert all(f"Table of {part}" in text for part in parts if part != "data")


@pytest.mark.slow
def test_the_whole_gpu_benchmark_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "gpu", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--output-dir", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "attention backend of head_dim" in done.stdout
    page = (tmp_path / "gpu.md").read_text()
    assert "gain of compilation" in page and "gain of padded widths, share of tp 8, eager" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    with pytest.raises(DeviceError, match="needs a GPU"):
        importlib.import_module("argonne.benchmarks.gpu").run(1)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh")],
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no GPU") and done.stderr.count("\n") == 1
