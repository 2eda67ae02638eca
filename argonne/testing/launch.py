"""Run the training script as a user does, and read what it left."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.files import OutputFolder

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "resume_pretrain_tensor.py")
FAULTY = str(Path(__file__).with_name("faulty_run.py"))
SHAPE = ["--model-config", "argonne-tiny", "--batch-size", "2", "--block-size", "64"]
SCHEDULE = ["--learning-rate", "3e-3", "--min-learning-rate", "3e-4", "--warmup-steps", "5"]


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    code: int
    stdout: str
    stderr: str

    def errors(self) -> list[str]:
        """Our own error lines."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MASTER_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(
    processes: int,
    *flags: Any,
    torchrun: tuple[str, ...] = ("--standalone",),
    fault: Mapping[str, Any] | None = None,
) -> list[str]:
    """Plain python for one process, torchrun for several; ``fault`` as faulty_run.py takes it."""
    script = [SCRIPT] if fault is None else [FAULTY, json.dumps({"rank": 0, **fault})]
    arguments = [*script, *map(str, flags)]
    if processes == 1:
        return [sys.executable, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
    return [*launcher, *arguments]


def start(
    processes: int,
    *flags: Any,
    torchrun: tuple[str, ...] = ("--standalone",),
    fault: Mapping[str, Any] | None = None,
) -> subprocess.Popen[str]:
    """Start a run in the background."""
    return subprocess.Popen(
        command(processes, *flags, torchrun=torchrun, fault=fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def wait(process: subprocess.Popen[str], timeout: float = 180.0) -> Finished:
    """Wait for a started run; one that hangs is killed and fails the test."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"the run did not end within {timeout:.0f} s:\n{stdout}\n{stderr}") from None
    return Finished(process.returncode, stdout, stderr)


def launch(
    processes: int, *flags: Any, timeout: float = 180.0, fault: Mapping[str, Any] | None = None
) -> Finished:
    """Run to the end."""
    return wait(start(processes, *flags, fault=fault), timeout)


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of training_metrics.jsonl."""
    lines = OutputFolder(output_dir).metrics.read_text().splitlines()
    return [json.loads(line) for line in lines]


def status(output_dir: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(OutputFolder(output_dir).status.read_text())
    return document


def checkpoint(output_dir: Path, step: int) -> Path:
    return OutputFolder(output_dir).checkpoint(step)


def wait_for_lines(
    output_dir: Path, lines: int, process: subprocess.Popen[str], timeout: float = 120.0
) -> None:
    """Until the metrics have so many lines."""
    deadline = time.monotonic() + timeout
    path = OutputFolder(output_dir).metrics
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        assert process.poll() is None, f"the run ended early:\n{process.communicate()}"
        time.sleep(0.05)
    raise AssertionError(f"there were not {lines} steps within {timeout:.0f} s")
