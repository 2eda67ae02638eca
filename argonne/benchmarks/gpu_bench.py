"""Runs of the training script on this machine's devices, and what the plan says of the same flags."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import argonne.testing.corpus as corpus
from argonne.benchmarks.common import Report, Row, table
from argonne.config.presets import PRESETS, REFERENCE
from argonne.errors import RunError
from argonne.files import OutputFolder
from argonne.testing.launch import ROOT, SCRIPT, Finished, command, environment, metrics, start
from argonne.tp.device_rates import known_device

WARM_UP = 3
"""Steps that do not count: compilation, the allocator's growth, NCCL's first connections."""
PATIENCE_SECONDS = 1800.0
"""For one run: drawing 5 billion weights and compiling take minutes."""
VOCABULARY = 151_665
"""Of Argonne 2.0's tokenizer; the corpus here has a small one, whose ids are the first of these."""
TINY = {
    "hidden_size": 144, "num_hidden_layers": 4, "num_attention_heads": 24, "num_key_value_heads": 8,
    "intermediate_size": 88, "vocab_size": 515,
}  # fmt: skip
TINY_DEVICE = "H100"
CHECK = " (1: yes)"
"""Ends the names of rows that hold or do not."""


class NotHere(RunError):
    """These devices cannot show it: too few, too small, or no room on the disk."""


@dataclass(kw_only=True)
class Part:
    """What one part of the page found."""

    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    printed: int = 0
    """Rows that are on the terminal already."""

    def add(self, other: Part) -> None:
        """Take in what another one found."""
        self.rows += other.rows
        self.remarks += other.remarks
        self.data |= other.data

    def attempt(self, what: str, work: Callable[[], Part]) -> None:
        """Add what ``work`` finds; what fails is a check that does not hold, and the others go on."""
        print(f"{what} ...", flush=True)
        try:
            found = work()
        except NotHere as error:
            self.leave_out(what, str(error))
        except RunError as error:
            self.fail(what, str(error))
        except Exception as error:  # noqa: BLE001 - one part's fault must not cost the page
            traceback.print_exc()
            self.fail(what, f"{type(error).__name__}: {error}")
        else:
            self.add(found)
            for line in table(Report(name="", title="", rows=tuple(found.rows[found.printed :])))[1:]:
                print("  " + "  ".join(filter(None, line)), flush=True)
        self.printed = len(self.rows)

    def fail(self, what: str, why: str) -> None:
        """A check that does not hold, and why."""
        self.rows.append(check_row(what, False))
        self.remarks.append(f"FAILED: {what}: {' '.join(why.split())[:300]}")

    def leave_out(self, what: str, why: str) -> None:
        """Say what is not on the page."""
        self.remarks.append(f"Left out: {what}: {' '.join(why.split())[:300]}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run, and what the plan says of it."""

    seconds: list[float]
    """Of each step that counts."""
    peak: int
    """Largest allocation of rank 0, bytes."""
    reserved: int
    """The most that torch's allocator of rank 0 held, bytes; 0 on the CPU."""
    used: int
    """Largest use of a device as the driver sees it, contexts and NCCL's buffers included; 0 on the CPU."""
    mfu: float | None
    plan: Mapping[str, Any]
    """Keys of ``--plan=json``."""
    stdout: str

    @property
    def predicted(self) -> float:
        """Seconds of a step."""
        return float(self.plan["predicted_step_seconds"]["total"])

    @property
    def predicted_peak(self) -> int:
        """Bytes that torch allocates."""
        return int(self.plan["bytes_per_rank"]["total"])


def plan_device(name: str, size: int) -> str:
    """What ``--plan-device`` knows a device by: its name, or its bytes."""
    return known_device(name) or str(size)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The devices, the model, the corpus and the place of the page's runs."""

    folder: Path
    devices: int
    on_gpu: bool
    device: str
    """``--plan-device``."""
    batch: int
    block: int
    steps: int
    """That count, of each timed run."""
    layers: int

    @classmethod
    def prepare(cls, folder: Path, *, on_gpu: bool, devices: int, steps: int) -> Bench:
        """Write the corpus, its tokenizer and the model's settings into ``folder``."""
        settings = {**PRESETS[REFERENCE], "vocab_size": VOCABULARY} if on_gpu else dict(TINY)
        device = TINY_DEVICE
        if on_gpu:
            properties = torch.cuda.get_device_properties(0)
            device = plan_device(properties.name, properties.total_memory)
        corpus.build_tokenizer(folder / "tokenizer")
        corpus.write_shards(folder / "data", corpus.short_texts(2000, 1000))
        bench = cls(
            folder=folder, devices=devices, on_gpu=on_gpu, device=device, batch=4 if on_gpu else 2,
            block=4096 if on_gpu else 32, steps=steps, layers=int(settings["num_hidden_layers"]),
        )  # fmt: skip
        bench.model.write_text(json.dumps(settings), encoding="utf-8")
        return bench

    @property
    def model(self) -> Path:
        return self.folder / "model.json"

    def with_layers(self, layers: int) -> Bench:
        """The same with a model of so many layers."""
        settings = json.loads(self.model.read_text(encoding="utf-8"))
        self.model.write_text(json.dumps({**settings, "num_hidden_layers": layers}), encoding="utf-8")
        return replace(self, layers=layers)

    def with_steps(self, steps: int) -> Bench:
        """The same with so many steps that count."""
        return replace(self, steps=steps)

    def output(self, name: str) -> Path:
        """The output folder of a run."""
        return self.folder / name.replace(" ", "_")

    def flags(self, *more: Any) -> list[str]:
        """The flags that all runs and plans have in common, and ``more``."""
        common = [
            "--model-config", self.model, "--tokenizer-path", self.folder / "tokenizer",
            "--data-glob", self.folder / "data" / "*.parquet", "--batch-size", self.batch,
            "--block-size", self.block, "--log-interval", 1, "--warmup-steps", 1,
        ]  # fmt: skip
        return [str(word) for word in (*common, *more)]

    # ---------------------------------------------------------------- the plan

    def plan(self, *flags: Any) -> dict[str, Any]:
        """The plan for these flags."""
        words = self.flags(*flags, "--plan=json", "--plan-world-size", self.devices)
        done = subprocess.run(
            [sys.executable, SCRIPT, *words, "--plan-device", self.device],
            capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        if done.returncode:
            raise RunError(_error_of(done.stderr))
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def deepest(self, *flags: Any) -> Bench:
        """This, or with as few layers fewer as let the plan of ``flags`` fit. Raises RunError at two."""
        layers = self.layers
        while layers >= 2:
            bench = self.with_layers(layers)
            if bench.plan(*flags)["fits"]:
                return bench
            layers = layers * 3 // 4
        raise RunError(f"not even two layers fit on {self.devices} x {self.device}")

    # ---------------------------------------------------------------- runs

    def start(self, name: str, *flags: Any) -> subprocess.Popen[str]:
        """Start the training script on all devices."""
        return start(self.devices, *self.flags(*flags, "--output-dir", self.output(name)))

    def launch(self, script: str, *flags: Any) -> Finished:
        """Run another script with a run's flags on all devices, to its end."""
        words = command(self.devices, *self.flags(*flags))
        words[words.index(SCRIPT)] = str(ROOT / "scripts" / script)
        done = subprocess.run(
            words, capture_output=True, text=True, env=environment(), timeout=PATIENCE_SECONDS
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def run(self, name: str, *flags: Any) -> Measured:
        """Train ``steps`` steps and some to warm up.

        Raises NotHere where the plan does not fit, RunError where the run ends early.
        """
        plan = self.plan(*flags)
        if not plan["fits"]:
            needed = plan["bytes_per_rank"]["total"] / 1e9
            raise NotHere(f"the plan says that it does not fit ({needed:.1f} GB a rank)")
        process = self.start(name, *flags)
        used, stdout = self._watch(process, name, WARM_UP + self.steps)
        lines = metrics(self.output(name))[WARM_UP : WARM_UP + self.steps]
        mfu = [line["mfu"] for line in lines if line.get("mfu") is not None]
        return Measured(
            seconds=[line["step_seconds"] for line in lines],
            peak=max(line["peak_memory_bytes"] for line in lines),
            reserved=max(line.get("peak_reserved_bytes", 0) for line in lines),
            used=used,
            mfu=sum(mfu) / len(mfu) if mfu else None,
            plan=plan,
            stdout=stdout,
        )

    def _watch(self, process: subprocess.Popen[str], name: str, lines: int) -> tuple[int, str]:
        """Let a run record so many steps and kill it: the most a device had in use, and what it printed."""
        deadline, used, path = time.monotonic() + PATIENCE_SECONDS, 0, OutputFolder(self.output(name)).metrics
        done = False
        try:
            while not done:
                try:
                    stdout, stderr = process.communicate(timeout=0.5)
                    raise RunError(_error_of(stderr))
                except subprocess.TimeoutExpired:
                    used = max(used, device_use()) if self.on_gpu else 0
                if time.monotonic() > deadline:
                    raise RunError(f"it made no {lines} steps within {PATIENCE_SECONDS:.0f} s")
                done = path.exists() and path.read_text(encoding="utf-8").count("\n") >= lines
        finally:
            kill_all(process)
        stdout, _ = process.communicate()
        if self.on_gpu:
            wait_until_free()
        return used, stdout


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and the ranks it started, as it is: what they would save at a stop is not wanted."""
    for pid in [*rank_pids(process).values(), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def rank_pids(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of what torchrun started."""
    found: dict[int, int] = {}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        for pid in children.read_text(encoding="utf-8").split():
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks = [int(word.removeprefix(b"RANK=")) for word in words if word.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, int(pid))
    return found


def device_use() -> int:
    """Bytes in use on the fullest device, as the driver sees it; asking makes no context of its own."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    mebibytes = [int(word) for word in done.stdout.split() if word.isdigit()]
    return max(mebibytes, default=0) * 2**20


def wait_until_free() -> None:
    """Until the driver has taken back what killed processes held."""
    deadline = time.monotonic() + 60
    while device_use() > 2 * 10**9 and time.monotonic() < deadline:
        time.sleep(1)


def _error_of(stderr: str) -> str:
    lines = stderr.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[0] if errors else (lines[-1] if lines else "it said nothing")


def check_row(what: str, held: bool) -> Row:
    """A check that holds (1) or does not (0)."""
    return Row(name=what + CHECK, ours=float(held), peer=1.0, unit="", target=1.0, at_least=True)


def worth(factor: float) -> str:
    """What a measured factor says of a default."""
    if math.isnan(factor):
        return "not decided"
    return "worth being the default" if factor >= 1.03 else "not worth being the default"
