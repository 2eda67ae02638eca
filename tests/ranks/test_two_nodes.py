"""Two nodes for real: two torchrun agents that meet by rendezvous; the second has no data and no output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.testing.launch import launch, metrics
from tests import ROOT

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "two_nodes_on_one_machine.sh"
FLAGS = ["--total-steps", "40", "--warmup-steps", "5", "--checkpoint-interval", "15"]


@pytest.mark.parametrize("network", ["namespaces", "loopback"])
def test_two_nodes_train_like_one_process(tmp_path: Path, network: str) -> None:
    done = subprocess.run(
        [
            "bash",
            str(SCRIPT),
            "--network",
            network,
            "--work-dir",
            str(tmp_path),
            "--stop-step",
            "4",
            "--",
            *FLAGS,
        ],
        env={**os.environ, "ARGONNE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=270,
    )
    if "needs root and the ip command" in done.stderr:
        pytest.skip("no right to make network namespaces here")
    assert done.returncode == 0, done.stderr
    assert "The second node has: nothing\n" in done.stdout
    assert "Start: resuming from run/pretrained/" in done.stdout
    first = tmp_path / "two_nodes_1" / "first" / "run"
    status = json.loads((first / "stats" / "run_status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 40)
    lines = metrics(first)
    assert [line["step"] for line in lines] == list(range(1, 41))

    alone = tmp_path / "alone"
    finished = launch(
        1, "--model-config", "argonne-tiny", "--tokenizer-path", tmp_path / "corpus/tokenizer",
        "--data-glob", tmp_path / "corpus/data/*.parquet", "--batch-size", 16, "--block-size", 128,
        "--learning-rate", 4e-3, "--min-learning-rate", 2e-4, *FLAGS, "--output-dir", alone,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    for mine, theirs in zip(lines, metrics(alone), strict=True):
        assert mine["stream_hash"] == theirs["stream_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-4)
