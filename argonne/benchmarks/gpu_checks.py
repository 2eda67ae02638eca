"""What a run on all devices must survive, save and prove: the checks of the page of the GPU's runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from argonne.benchmarks.checkpoint_raw import raw_direct_write, raw_write
from argonne.benchmarks.common import Row, stopwatch
from argonne.benchmarks.gpu_bench import Bench, NotHere, Part, check_row, rank_pids
from argonne.benchmarks.gpu_layouts import degrees, layout_name
from argonne.errors import RunError
from argonne.files import OutputFolder
from argonne.testing.launch import metrics, wait, wait_for_lines
from argonne.tp.device_rates import device_rates

PROFILED = (5, 3)
"""First step and number of steps of the trace."""
STALL_SECONDS = 20
SAVED = (4, 7)
"""Step of a save that the loop goes on from, and the last one."""
_BANDWIDTH = re.compile(r"([\d.]+) GB/s in ([^,]+?)(?=,|$)")
_SHARES = re.compile(r"compute ([\d.]+)%, exposed communication ([\d.]+)%, idle ([\d.]+)%")
_RAW_BYTES = 8 << 30


def bandwidths(bench: Bench) -> Part:
    """Of the collectives at the sizes of a step, by preflight.py, in every layout and kind."""
    part, assumed = Part(), device_rates(bench.device).link / 1e9
    for size in degrees(bench.devices):
        for flags in ((), ("--sequence-parallel",)) if size > 1 else ((),):
            name = " ".join([layout_name(bench.devices, size), *flags])
            done = bench.launch("preflight.py", "--tensor-parallel-size", size, *flags,
                                "--output-dir", bench.output("preflight"))  # fmt: skip
            (line,) = [row for row in done.stdout.splitlines() if row.startswith("collectives")] or [""]
            for rate, what in _BANDWIDTH.findall(line):
                part.rows.append(
                    Row(name=f"bus bandwidth, {name}: {what}", ours=float(rate), peer=assumed, unit="GB/s",
                        at_least=True, target=0.9 if bench.on_gpu else None)
                )  # fmt: skip
            failed = [row for row in done.stdout.splitlines() if " FAIL " in row]
            part.rows.append(check_row(f"preflight, {name}: every check holds", done.code == 0))
            part.remarks += failed
    return part


def verified(bench: Bench) -> Part:
    """--verify-sharding: gradients against the unsharded model, over the real links."""
    part, every = Part(), [(), ("--sequence-parallel",), ("--sequence-parallel", "--compile")]
    for size in degrees(bench.devices):
        for flags in every if size > 1 else every[:1]:
            name = " ".join([layout_name(bench.devices, size), "--verify-sharding", *flags])
            words = ("--tensor-parallel-size", size, "--verify-sharding", *flags)
            part.attempt(name, lambda name=name, words=words: _verified(bench, name, words))  # type: ignore[misc]
    return part


def _verified(bench: Bench, name: str, flags: tuple[object, ...]) -> Part:
    run = bench.with_steps(1).run(name, *flags)
    lines = [line for line in run.stdout.splitlines() if "largest relative error" in line]
    return Part(rows=[check_row(name, bool(lines))], remarks=[f"{name}: {line}" for line in lines])


def traced(bench: Bench) -> Part:
    """Where the time of a step goes, from a trace of the device."""
    first, count = PROFILED
    window = ("--profile", f"{first}:{count}")
    run = bench.with_steps(first + count).run("trace", "--tensor-parallel-size", bench.devices, *window)
    shares = next((found for line in run.stdout.splitlines() if (found := _SHARES.search(line))), None)
    if shares is None:
        raise RunError("the run printed no shares of its profile")
    _, exposed, idle = (float(share) / 100 for share in shares.groups())
    parts = run.plan["predicted_step_seconds"]
    name = layout_name(bench.devices, bench.devices)
    expected = {
        "exposed communication": (exposed, (parts["tensor_parallel"] + parts["replicas"]) / run.predicted),
        "idle time": (idle, parts["waiting"] / run.predicted),
    }
    return Part(
        rows=[
            Row(name=f"share of {what}, {name}", ours=ours, peer=peer, unit="")
            for what, (ours, peer) in expected.items()
        ]
    )


# ------------------------------------------------------------------ saving


def disk_rate(folder: Path, size: int) -> float:
    """Bytes a second of a raw write: a direct one where the file system has O_DIRECT."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "raw"
        try:
            return size / stopwatch(lambda: raw_direct_write(size, path))
        except OSError:
            data = {"all": torch.zeros(size // 4)}
            return size / stopwatch(lambda: raw_write(data, path))


def saves(bench: Bench) -> Part:
    """A save in the background and one that is waited for, and the way back: all beside the raw disk."""
    size = ("--tensor-parallel-size", bench.devices)
    whole = int(bench.plan(*size)["checkpoint_bytes"])
    room = os.statvfs(bench.folder)
    if room.f_bavail * room.f_frsize < 2.2 * whole:
        raise NotHere(f"{bench.folder} has no room for two checkpoints of {whole / 1e9:.1f} GB")
    rate = disk_rate(bench.folder, min(_RAW_BYTES, max(1 << 24, whole)))
    part = Part(data={"disk bytes a second": rate, "checkpoint bytes": whole})
    for how in ("on", "off"):
        steps = (*size, "--async-checkpoint", how, "--checkpoint-interval", SAVED[0], "--keep-checkpoints", 1)
        name = f"save {how}"
        scratch = FirstStep(bench, name, *steps)
        finished = wait(scratch.process, 1800)
        if finished.code:
            raise RunError(finished.errors()[0] if finished.errors() else "the run failed")
        # The last save is waited for, and so is the one before it.
        held = max(line["checkpoint_seconds"] for line in metrics(bench.output(name))[: SAVED[1] - 1])
        part.rows.append(
            Row(name=f"--async-checkpoint {how}: held up by a save / raw write", ours=held,
                peer=whole / rate, unit="s", note=f"{whole / 1e9:.2f} GB")
        )  # fmt: skip
        said = finished.stdout.replace(f"{bench.folder}/", "")
        part.remarks += [line for line in said.splitlines() if line.startswith("Saved ")]
        resumed = FirstStep(bench, name, *steps, total=12)
        ended = wait(resumed.process, 1800)
        part.rows.append(check_row(f"resumed from the checkpoint of --async-checkpoint {how}",
                                   ended.code == 0 and "resuming from" in ended.stdout))  # fmt: skip
        part.rows.append(
            Row(name=f"launch to the first step, resumed ({how}) / from scratch", ours=resumed.seconds,
                peer=scratch.seconds, unit="s")
        )  # fmt: skip
        for path in OutputFolder(bench.output(name)).pretrained.glob("*.pth"):
            path.unlink()
    return part


class FirstStep:
    """A run of a few steps, and the seconds from its launch to its first step."""

    def __init__(self, bench: Bench, name: str, *flags: object, total: int = SAVED[1]) -> None:
        path = OutputFolder(bench.output(name)).metrics
        before = path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
        began = time.perf_counter()
        self.process: subprocess.Popen[str] = bench.start(name, *flags, "--total-steps", total)
        wait_for_lines(bench.output(name), before + 1, self.process, 1800)
        self.seconds = time.perf_counter() - began


# ------------------------------------------------------------------ faults


def faults(bench: Bench) -> Part:
    """A rank that is killed, and one that is stopped: one line names it, and every process ends."""
    if bench.devices == 1:
        raise NotHere("one device has no peer to lose")
    part, victim = Part(), bench.devices - 1
    for what, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        name = f"rank {victim} {what}"
        process = bench.start(name, "--tensor-parallel-size", bench.devices, "--stall-timeout", STALL_SECONDS)
        wait_for_lines(bench.output(name), 5, process, 1800)
        pid, began = rank_pids(process)[victim], time.perf_counter()
        os.kill(pid, number)
        finished = wait(process, 600)
        took = time.perf_counter() - began
        errors = finished.errors()
        named = len(errors) == 1 and f"rank {victim}" in errors[0]
        part.rows.append(
            check_row(f"{name}: one line names it, exit code not 0", named and finished.code != 0)
        )
        part.remarks.append(f"{name}: ended after {took:.1f} s: " + " | ".join(errors or ["no line"]))
    return part
