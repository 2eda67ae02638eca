"""Time to the first answer: ``--help`` against bare python, launch to first step against bare imports."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from argonne.benchmarks.common import ROUNDS, Report, interleaved, stopwatch, summary, timed_row
from argonne.errors import DeviceError
from argonne.files import OutputFolder
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCRIPT, SHAPE, environment

POLL_SECONDS = 0.005
LONGEST_SECONDS = 300.0
BARE = """
import os
import sys
import torch
from transformers import AutoTokenizer, PreTrainedModel
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
if torch.distributed.get_rank() == 0:
    open(sys.argv[1], "w").write("ready")
os._exit(0)
"""


def run_once(command: Sequence[str]) -> float:
    return stopwatch(
        lambda: subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=True)
    )


def until_written(command: Sequence[str], path: Path) -> float:
    """Seconds from the launch until ``path`` has something in it; then waits for the end of the run."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not path.exists() or not path.stat().st_size:
        if process.poll() is not None and process.returncode:
            raise DeviceError(f"{' '.join(command[-4:])} failed: {process.communicate()[1][-300:]}")
        if time.perf_counter() - start > LONGEST_SECONDS:
            process.kill()
            raise DeviceError(f"{path} did not appear within {LONGEST_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    process.communicate()
    return seconds


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


class Toy:
    """argonne-tiny on a small corpus; each launch gets a folder of its own, its shard index at hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_glob, tokenizer, _ = small_corpus(folder)
        self.tokenizer = str(tokenizer)
        self.bare = folder / "bare.py"
        self.bare.write_text(BARE, encoding="utf-8")
        self.launches = 0

    def first_step(self, launcher: list[str]) -> float:
        self.launches += 1
        output = self.folder / f"run{self.launches}"
        flags = [
            "--tokenizer-path", self.tokenizer, "--data-glob", self.data_glob, "--output-dir", str(output),
            "--total-steps", "1", *SHAPE,
        ]  # fmt: skip
        return until_written([*launcher, SCRIPT, *flags], OutputFolder(output).metrics)

    def imports(self, launcher: list[str]) -> float:
        self.launches += 1
        path = self.folder / f"bare{self.launches}"
        return until_written([*launcher, str(self.bare), str(path)], path)


def run(rounds: int = ROUNDS) -> Report:
    helps = {
        "help": lambda: run_once([sys.executable, SCRIPT, "--help"]),
        "python": lambda: run_once([sys.executable, "-c", "pass"]),
        "torchrun": lambda: run_once([sys.executable, "-m", "torch.distributed.run", "--help"]),
    }
    with tempfile.TemporaryDirectory() as name:
        toy = Toy(Path(name))
        launches = {
            "first step": lambda: toy.first_step(torchrun(2)),
            "imports": lambda: toy.imports(torchrun(2)),
        }
        seconds = interleaved(helps, rounds) | interleaved(launches, rounds)
    return Report(
        name="startup",
        title="Time to the first answer",
        rows=(
            timed_row("--help, above bare python", seconds["help"], seconds["python"], difference=True,
                      target=0.15),
            timed_row("--help / torchrun --help", seconds["help"], seconds["torchrun"]),
            timed_row("launch to the first step on two ranks, above torchrun with bare imports",
                      seconds["first step"], seconds["imports"], difference=True, target=1.0),
        ),
        remarks=(
            "Bare imports: torch, transformers' AutoTokenizer and PreTrainedModel, init_process_group and a "
            "barrier over gloo. The first step: the first line of the metrics of argonne-tiny, from scratch.",
        ),
        data={variant: summary(values) for variant, values in seconds.items()},
    )  # fmt: skip
