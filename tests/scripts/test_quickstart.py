"""scripts/quickstart.sh in a copy of the repository: installs, trains, stops, resumes; twice; and Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from argonne.testing.launch import ROOT, checkpoint, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, as a fresh clone has them."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout: which files belong to the repository is not known")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def quickstart(folder: Path) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ARGONNE_", "PYTHONPATH"))}
    return subprocess.Popen(
        ["bash", "scripts/quickstart.sh"],
        cwd=folder,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_whole_story_twice_and_an_interrupt(copy: Path) -> None:
    for number in (1, 2):
        process = quickstart(copy)
        stdout, stderr = process.communicate(timeout=800)
        assert process.returncode == 0, stdout + stderr
        run = copy / "quickstart" / f"run_{number}"
        lines = metrics(run)
        assert [line["step"] for line in lines] == list(range(1, 241))
        first, last = (sum(line["loss"] for line in part) / 20 for part in (lines[:20], lines[-20:]))
        assert last < first - 1.5
        assert len(list((run / "pretrained").glob("*.pth"))) == 2  # at the stop and at the end
        family = metrics(run / "family")
        assert [line["step"] for line in family] == list(range(1, 61))
        rates = [line["lr"] for line in family]
        assert rates[10:48] == [4e-3] * 38 and rates[-1] < rates[48]  # wsd: flat, then a cooldown
        assert family[-1]["loss"] < family[0]["loss"] - 1
        saved = torch.load(checkpoint(run / "family", 60), weights_only=True, mmap=True)["model_config"]
        assert saved["qk_norm"] and saved["sandwich_norm"] and saved["logit_softcap"]
        assert (run / "stats" / "training.png").stat().st_size > 10_000
        assert "torchrun --standalone --nproc_per_node=8 resume_pretrain_tensor.py" in stdout

    process = quickstart(copy)
    record = copy / "quickstart" / "run_3" / "stats" / "training_metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (record.exists() and record.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: every process of the foreground gets it
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stdout + stderr
    assert "Nothing is left running" in stdout
    status = json.loads((record.parent / "run_status.json").read_text())
    assert status["state"] in ("stopped", "failed")
