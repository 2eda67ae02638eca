"""Real runs on all devices of this machine, each beside the plan's prediction: one page for the GPU day.

``--device cpu`` does all of it with two processes and a tiny model, to test the page itself; the predictions
are an H100's then, and its ratios mean nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from argonne.benchmarks.common import Report
from argonne.benchmarks.gpu_bench import CHECK, Bench, Part
from argonne.benchmarks.gpu_checks import bandwidths, faults, saves, traced, verified
from argonne.benchmarks.gpu_layouts import layouts
from argonne.errors import DeviceError

CPU_PROCESSES = 2


def devices_of(device_name: str) -> int:
    """How many ranks the page is about. Raises DeviceError without a GPU."""
    if device_name != "cuda":
        return CPU_PROCESSES
    if not torch.cuda.is_available():
        raise DeviceError(
            "benchmark.py gpu-runs needs a GPU, and torch sees none here (--device cpu tests it)"
        )
    return torch.cuda.device_count()


def run(rounds: int, device_name: str = "cuda") -> Report:
    devices = devices_of(device_name)
    on_gpu = device_name == "cuda"
    with tempfile.TemporaryDirectory(dir=".", prefix="gpu-runs-", ignore_cleanup_errors=True) as folder:
        asked = Bench.prepare(Path(folder).resolve(), on_gpu=on_gpu, devices=devices, steps=rounds)
        bench = asked.deepest("--tensor-parallel-size", devices)
        page = Part()
        if bench.layers < asked.layers:
            page.leave_out(
                f"{asked.layers - bench.layers} of {asked.layers} layers",
                f"the whole model does not fit on {devices} of these devices by the plan",
            )
        for what, part in {
            "bandwidth of the collectives": bandwidths,
            "steps of the layouts": layouts,
            "gradients against the unsharded model": verified,
            "a trace": traced,
            "saving and resuming": saves,
            "a killed and a stopped rank": faults,
        }.items():
            page.attempt(what, lambda part=part: part(bench))  # type: ignore[misc]
    failed = [row.name for row in page.rows if row.name.endswith(CHECK) and not row.met]
    verdict = f"FAILED: {'; '.join(failed)}" if failed else "Every check held."
    name = torch.cuda.get_device_name(0) if on_gpu else "CPU process, a tiny model"
    return Report(
        name="gpu-runs",
        title=f"Runs on {devices} x {name}: measured over predicted, medians of {rounds} steps",
        rows=tuple(page.rows),
        remarks=(
            verdict,
            "'ours' is measured; 'peer' is the plan's prediction (--plan=json) of the same flags, or the "
            "rate that it assumes.",
            *page.remarks,
        ),
        data=page.data,
    )
