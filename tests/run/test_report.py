"""Console lines, metrics and statistics, also where the stream or the disk fails."""

import fcntl
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from argonne.files import read_json, write_json
from argonne.run.lines import RunFacts, bar_text
from argonne.run.report import RunReport, StepRecord
from tests import ROOT

POSITION = {
    "file_name": "/data/000_00042.parquet",
    "current_file_idx": 42,
    "position_in_file": 1234,
    "chunk_offset": 5,
}


def record(step: int, **changes: Any) -> StepRecord:
    fields: dict[str, Any] = {
        "step": step,
        "loss": 2.34561,
        "lr": 2.5e-4,
        "grad_norm": 1.5,
        "tokens": 1000,
        "tokens_processed": 1_234_567_890,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.01,
        "peak_memory_bytes": 10,
        "position": POSITION,
    }
    return StepRecord(**{**fields, **changes})


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    (tmp_path / "stats").mkdir()
    return tmp_path / "stats"


def begun(
    folder: Path, *, rank: int = 0, log_interval: int = 50, first_step: int = 0, **numbers: Any
) -> RunReport:
    """A report whose loop has begun."""
    report = RunReport(folder, rank=rank, log_interval=log_interval)
    report.begin(first_step=first_step, total_steps=10, **numbers)
    return report


def lines_of(stats: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stats / "training_metrics.jsonl").read_text().splitlines()]


def test_the_printed_lines(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = begun(stats.parent, log_interval=500)
    for step in (999, 1000):
        report.step(record(step))
    report.sample(1000, "Long long time ago, there was", prompt="Long long time ago, ")
    out, err = capsys.readouterr()
    assert out.splitlines()[:3] == [
        "Step 1000 | Loss: 2.3456 | Tokens: 1,234,567,890",
        "Current LR: 2.50e-04",
        "Shard: 000_00042.parquet | File index: 42 | Position: 1234 | Chunk: 5",
    ]
    assert out.splitlines()[3:5] == ["--- Generated text at step 1000 ---", "Long long time ago, there was"]
    assert err == ""
    report.close()


def test_a_line_for_each_source_of_a_mixture(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the last loss that a source had: it may have no sample in this step."""
    report = begun(stats.parent, log_interval=2)
    places = {
        "web": {**POSITION, "epoch": 1},
        "code": {**POSITION, "epoch": 0},
        "math": {**POSITION, "epoch": 0},
    }
    for step, losses in ((1, {"web": 3.0, "code": 1.5}), (2, {"web": 2.0})):
        extra = {"loss_by_source": losses, "samples_by_source": {"web": 1999 + step, "code": 7, "math": 0}}
        report.step(record(step, position={"sources": places, "mixture": {}}, extra=extra))
    shard = "Shard: 000_00042.parquet | File index: 42 | Position: 1234 | Chunk: 5"
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"Source: web | Loss: 2.0000 | Samples: 2,001 | Epoch: 1 | {shard}",
        f"Source: code | Loss: 1.5000 | Samples: 7 | Epoch: 0 | {shard}",
        f"Source: math | Loss: none yet | Samples: 0 | Epoch: 0 | {shard}",
    ]
    report.close()


def test_other_ranks_are_silent(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = begun(stats.parent, rank=1, log_interval=1)
    report.step(record(1))
    report.info("x")
    report.warn("y")
    report.checkpoint_saved(1, stats / "x.pth", bytes=1, seconds=1.0)
    report.finish("finished")
    report.close()
    assert capsys.readouterr() == ("", "") and list(stats.iterdir()) == []


def test_the_header_names_what_runs(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = begun(stats.parent)
    report.header(
        RunFacts(
            model="argonne-2.0",
            parameters=4_918_072_800,
            tp_size=8,
            dp_size=2,
            device="NVIDIA H100 80GB HBM3",
            precision="bf16",
            batch_size=4,
            accumulation=3,
            block_size=4096,
            data="10 shards",
            checkpoint="from scratch",
            output_dir="out",
            save_bytes=59_000_000_000,
            save_seconds=59.0,
            save_share=0.021,
        )
    )
    out = capsys.readouterr().out
    for text in (
        "4,918,072,800",
        "tensor parallel 8 x data parallel 2",
        "H100",
        "24 sequences",
        "98,304 tokens",
    ):
        assert text in out
    assert "59.00 GB" in out and "2.1%" in out and "from scratch" in out
    report.close()


def test_metrics_have_the_agreed_keys(stats: Path) -> None:
    report = begun(stats.parent, flops_per_token=100.0, peak_flops_total=400_000.0)
    report.step(record(1, loss=float("nan"), grad_norm=float("inf"), extra={"skipped": True, "epoch": 2}))
    (line,) = lines_of(stats)
    assert line == {
        "step": 1,
        "loss": None,
        "lr": 2.5e-4,
        "grad_norm": None,
        "tokens_processed": 1_234_567_890,
        "step_seconds": 0.5,
        "tokens_per_second": 2000.0,
        "data_wait_seconds": 0.01,
        "peak_memory_bytes": 10,
        "checkpoint_seconds": 0.0,
        "mfu": 0.5,
        "skipped": True,
        "epoch": 2,
    }
    report.close()


def test_a_resume_replaces_what_lay_beyond(stats: Path) -> None:
    first = begun(stats.parent)
    for step in range(1, 6):
        first.step(record(step, loss=1.0))
    first.close()
    path = stats / "training_metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "loss"')  # killed while writing
    second = begun(stats.parent, first_step=3)
    second.step(record(4, loss=2.0))
    second.close()
    assert [(line["step"], line["loss"]) for line in lines_of(stats)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
    ]
    begun(stats.parent).close()
    assert lines_of(stats) == []
    assert sorted(os.listdir(stats)) == ["training_metrics.jsonl"]


def test_statistics_with_each_checkpoint_and_at_the_end(
    stats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = begun(stats.parent, first_step=5)
    report.step(record(6, loss=float("nan")))
    report.warn("odd rows were skipped", "(3 in a.parquet)")
    report.warn("odd rows were skipped", "(9 in b.parquet)")
    report.checkpoint_saved(6, stats / "tensor_parallel_checkpoint_step_6.pth", bytes=10**9, seconds=1.0)
    current = read_json(stats / "current_training_stats_tensor_parallel_step_6.json")
    assert current is not None and current["step"] == 6 and current["loss"] is None
    assert current["steps_this_run"] == 1 and current["data_position"] == POSITION
    report.finish("finished")
    report.close()
    (final,) = stats.glob("final_training_stats_tensor_parallel_*.json")
    assert re.fullmatch(r"final_training_stats_tensor_parallel_\d{8}_\d{6}\.json", final.name)
    document = read_json(final)
    assert document is not None and document["state"] == "finished"
    assert document["warnings"] == {"odd rows were skipped": 2}
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "warning: odd rows were skipped (3 in a.parquet)",
        "warning: 2 times: odd rows were skipped",
    ]


def test_a_stats_folder_that_vanished(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats.rmdir()
    report = begun(stats.parent, log_interval=1)
    report.step(record(1))
    report.checkpoint_saved(1, Path("x.pth"), bytes=1, seconds=1.0)
    report.finish("finished")
    report.close()
    out, err = capsys.readouterr()
    assert "Step 1 |" in out and err.count("warning:") == 3


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.run.test_report import record
from tests.run.test_report import begun
report = begun(Path({folder!r}), log_interval=1)
for step in range(1, 6):
    report.step(record(step))
report.finish("finished")
report.close()
"""


def run_script(folder: Path, **how: Any) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(root=str(ROOT), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", script], **how)


def test_a_reader_that_goes_away_does_not_end_the_run(stats: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = run_script(stats.parent, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, err = process.communicate()
    assert process.returncode == 0 and err.decode().splitlines()[0].startswith(
        "warning: stdout cannot be written"
    )
    assert len(err.decode().splitlines()) == 1 and len(lines_of(stats)) == 5


def test_stdout_closed_from_the_start(stats: Path) -> None:
    script = SCRIPT.format(root=str(ROOT), folder=str(stats.parent))
    command = ["bash", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, script]
    assert subprocess.run(command).returncode == 0 and len(lines_of(stats)) == 5


def test_a_file_size_limit(stats: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))

    process = run_script(stats.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=limit)
    out, err = process.communicate()
    assert process.returncode == 0 and out.count(b"Step ") == 5
    assert b"training_metrics.jsonl cannot be written" in err
    assert 0 < len(lines_of(stats)) < 5


def test_a_terminal_gets_a_bar(stats: Path) -> None:
    terminal, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = run_script(stats.parent, stdout=subprocess.PIPE, stderr=worker)
    os.close(worker)
    out, _ = process.communicate()
    drawn = b""
    try:
        while part := os.read(terminal, 4096):
            drawn += part
    except OSError:
        pass  # how a terminal says that it is closed
    os.close(terminal)
    assert process.returncode == 0 and out.count(b"Step ") == 5
    assert b"5/10" in drawn and b"loss 2.3456, 2,000 tokens/s, ETA 0:00:0" in drawn
    assert b"\x1b" not in out and b"\r" not in out


def test_files_get_plain_lines(stats: Path) -> None:
    process = run_script(stats.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = process.communicate()
    assert out.decode().splitlines()[0] == "Step 1 | Loss: 2.3456 | Tokens: 1,234,567,890"
    assert len(out.splitlines()) == 15 and b"\x1b" not in out and b"\r" not in out


def test_what_stands_behind_the_bar() -> None:
    line = {"loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.4119}
    assert bar_text(line, stage="anneal", seconds_left=93_784.4) == (
        "loss 2.5000, 12,346 tokens/s, MFU 41.2%, anneal ETA 1d 2:03:04"
    )
    assert bar_text({**line, "mfu": 0.4}, stage="", seconds_left=59.6).endswith("MFU 40.0%, ETA 0:01:00")


def test_samples_are_kept_and_replaced_by_a_resume(stats: Path) -> None:
    first = begun(stats.parent)
    for step in (2, 4):
        first.sample(step, f"Once {step}", prompt="Once", extra={"stage": "base"})
    first.close()
    second = begun(stats.parent, first_step=3)
    second.sample(4, "Once again", prompt="Once")
    second.close()
    lines = [json.loads(line) for line in (stats / "samples.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 2, "prompt": "Once", "text": "Once 2", "stage": "base"},
        {"step": 4, "prompt": "Once", "text": "Once again"},
    ]


def test_a_run_that_goes_back_replaces_what_lay_beyond(stats: Path) -> None:
    report = begun(stats.parent)
    for step in range(1, 6):
        report.step(record(step, loss=1.0))
        report.sample(step, "x", prompt="x")
    report.spike({"step": 6}, "Spike at step 6")
    report.rewind(3)
    report.step(record(4, loss=2.0))
    report.close()
    assert [(line["step"], line["loss"]) for line in lines_of(stats)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
    ]
    samples = [json.loads(line)["step"] for line in (stats / "samples.jsonl").read_text().splitlines()]
    assert samples == [1, 2, 3]
    assert json.loads((stats / "spikes.jsonl").read_text()) == {"step": 6}


def test_json_files_are_whole_or_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": float("inf"), "p": tmp_path, "n": [1, (2.5, None)]})
    assert read_json(path) == {"x": None, "p": str(tmp_path), "n": [1, [2.5, None]]}
    (tmp_path / "b.json").write_text("[1")
    assert read_json(tmp_path / "b.json") is None and read_json(tmp_path / "c.json") is None
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]
