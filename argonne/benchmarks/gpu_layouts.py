"""Step, memory and utilisation of the layouts of this machine's devices, beside the plan's prediction."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from argonne.benchmarks.common import Row
from argonne.benchmarks.gpu_bench import Bench, Measured, Part, worth


@dataclass(frozen=True, kw_only=True)
class Case:
    """Flags of a timed run; all have the same tokens a step but the one that says so."""

    name: str
    flags: tuple[str, ...]


def degrees(devices: int) -> list[int]:
    """Tensor-parallel degrees to compare: all devices, a half and a quarter of them."""
    return [devices // share for share in (1, 2, 4) if devices % share == 0]


def step_samples(bench: Bench) -> int:
    """Sequences of a step: one micro-batch on as many replicas as any of the layouts has."""
    return bench.batch * max(2, bench.devices // min(degrees(bench.devices)))


def layout_name(devices: int, size: int) -> str:
    return f"tp {size}" if size == devices else f"tp {size} x dp {devices // size}"


def cases(bench: Bench) -> Iterator[Case]:
    """What is timed, the plainest first."""
    samples = ("--global-batch-size", str(step_samples(bench)))
    whole = ("--tensor-parallel-size", str(bench.devices))
    name = layout_name(bench.devices, bench.devices)
    variants = {
        "": (),
        ", widths as they are": ("--pad-widths", "off"),
        ", compiled": ("--compile",),
        ", full recomputation": ("--activation-checkpointing", "full"),
    }
    if bench.devices > 1:
        variants |= {
            ", sequence parallel": ("--sequence-parallel",),
            ", sequence parallel, compiled": ("--sequence-parallel", "--compile"),
        }
        if bench.on_gpu:
            variants[", sequence parallel, compiled, async"] = (
                "--sequence-parallel", "--compile", "--async-tp",
            )  # fmt: skip
    for what, flags in variants.items():
        yield Case(name=name + what, flags=(*whole, *samples, *flags))
    yield Case(name=f"{name}, one micro-batch a step", flags=whole)
    for size in degrees(bench.devices)[1:]:
        name, cut = layout_name(bench.devices, size), ("--tensor-parallel-size", str(size))
        several: dict[str, tuple[str, ...]] = {", compiled": ("--compile",)}
        if size > 1:
            several[", sequence parallel"] = ("--sequence-parallel",)
            several[", sequence parallel, compiled"] = ("--sequence-parallel", "--compile")
        for what, flags in {"": (), **several}.items():
            yield Case(name=name + what, flags=(*cut, *samples, *flags))


def step_rows(case: Case, run: Measured) -> list[Row]:
    """Seconds and bytes, measured over predicted."""
    mfu = f"MFU {run.mfu:.1%}" if run.mfu is not None else ""
    rounds = (min(run.seconds) / run.predicted, max(run.seconds) / run.predicted)
    rows = [
        Row(name=f"step, {case.name}", ours=statistics.median(run.seconds), peer=run.predicted, unit="s",
            spread=rounds, note=mfu)
    ]  # fmt: skip
    if run.used:
        used = f"{run.reserved / 1e9:.1f} GB reserved, {run.used / 1e9:.1f} GB in use on the device"
        rows.append(
            Row(name=f"peak allocated, {case.name}", ours=run.peak, peer=run.predicted_peak, unit="B",
                target=1.05, note=used)
        )  # fmt: skip
    return rows


def layouts(bench: Bench) -> Part:
    """Every case that fits, and what follows for the defaults."""
    part, runs = Part(), dict[str, Measured]()
    for case in cases(bench):

        def one(case: Case = case) -> Part:
            run = runs[case.name] = bench.run(case.name, *case.flags)
            record = {"seconds": run.seconds, "peak": run.peak, "reserved": run.reserved}
            record |= {"used": run.used, "mfu": run.mfu}
            return Part(rows=step_rows(case, run), data={case.name: record | {"plan": dict(run.plan)}})

        part.attempt(f"step, {case.name}", one)
    part.remarks += decisions(bench, runs)
    return part


def gain(runs: dict[str, Measured], slow: str, fast: str) -> float | None:
    """Times as fast; None where one of the two was not measured."""
    if slow not in runs or fast not in runs:
        return None
    return statistics.median(runs[slow].seconds) / statistics.median(runs[fast].seconds)


def decisions(bench: Bench, runs: dict[str, Measured]) -> list[str]:
    """What the measurements say of each default."""
    whole = layout_name(bench.devices, bench.devices)
    asked = {
        "--compile": (whole, f"{whole}, compiled"),
        "--pad-widths on": (f"{whole}, widths as they are", whole),
        "--sequence-parallel": (whole, f"{whole}, sequence parallel"),
        "--sequence-parallel --compile": (
            f"{whole}, compiled", f"{whole}, sequence parallel, compiled",
        ),
        "--async-tp": (
            f"{whole}, sequence parallel, compiled", f"{whole}, sequence parallel, compiled, async",
        ),
    }  # fmt: skip
    lines = []
    for flag, (slow, fast) in asked.items():
        factor = gain(runs, slow, fast)
        if factor is not None:
            lines.append(f"Default: {flag} makes {slow} {factor:.2f} times as fast: {worth(factor)}")
    same = {name: run for name, run in runs.items() if "one micro-batch" not in name}
    if len(same) > 1:
        fastest = min(same, key=lambda name: statistics.median(same[name].seconds))
        foretold = min(same, key=lambda name: same[name].predicted)
        lines.append(f"Fastest measured: {fastest}; by the plan: {foretold} (it does not model --compile)")
    return lines
