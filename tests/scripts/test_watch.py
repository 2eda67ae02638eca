"""scripts/watch.py: a run's state from its files alone."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from watch import main

from argonne.tools.run_watch import view

HEARTBEAT = "2026-01-02T03:04:05+0000"
NOW = datetime(2026, 1, 2, 3, 4, 5).timestamp() - datetime(1970, 1, 1).timestamp()


def write(folder: Path, state: str) -> Path:
    stats = folder / "stats"
    stats.mkdir(parents=True)
    lines = [
        {
            "step": step, "loss": 9.0 - step, "lr": 1e-3, "grad_norm": 1.5, "tokens_processed": 1000 * step,
            "tokens_per_second": 500.0, "step_seconds": 2.0, "peak_memory_bytes": 2**31, "mfu": 0.41,
            "loss_by_source": {"math": 2.0, "code": None}, "stage": "anneal",
        }
        for step in range(1, 6)
    ]  # fmt: skip
    (stats / "training_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"step": 4, "name": "web", "loss": 3.25, "bits_per_byte": 0.9}
    (stats / "eval_metrics.jsonl").write_text(json.dumps(evaluation) + "\n")
    status = {
        "state": state, "host": "node1", "pid": 7, "total_steps": 1805, "heartbeat": HEARTBEAT,
        "checkpoint": "pretrained/c_5.pth", "reason": None if state == "running" else "SIGTERM",
    }  # fmt: skip
    (stats / "run_status.json").write_text(json.dumps(status))
    return folder


def test_what_is_shown(tmp_path: Path) -> None:
    local = datetime.strptime(HEARTBEAT, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    lines = view(write(tmp_path / "r", "running"), plain=True, now=local + 3)
    assert lines[0] == "r: running on node1 (pid 7)"
    assert (
        lines[1] == "step 5 of 1,805 (stage anneal) | 5,000 tokens | 500 tokens/s | MFU 41.0% | 1h 00m to go"
    )
    assert lines[2].startswith("loss 8.00 @") and "  math: 2.000" in lines
    assert "validation web: 3.250 nats per token, 0.900 bits per byte (step 4)" in lines
    assert lines[-1] == "checkpoint: pretrained/c_5.pth"
    late = view(tmp_path / "r", plain=True, now=local + 7200)
    assert "no heartbeat for 2h 00m" in late[0]


def test_it_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "r", "stopped"))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("r: stopped on node1 (pid 7): SIGTERM\n") and "\033" not in out


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    assert main([str(tmp_path), "--once"]) == 1
    assert capsys.readouterr().err.count("error: ") == 2
