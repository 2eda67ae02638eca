"""What the benchmarks share: rows with a ratio and its target, interleaved timing, tables, JSON, charts."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from argonne.errors import DataError

ROUNDS = 9
"""Rounds of a timed comparison: the variants run in turn in each, and minima are compared."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio. ``ours`` and ``peer`` are in ``unit``; a count has no spread."""

    name: str
    ours: float
    peer: float
    unit: str
    target: float | None = None
    """None: no target, given for information."""
    at_least: bool = False
    """The target is a floor rather than a ceiling."""
    inverse: bool = False
    """The ratio is peer / ours (a speed-up)."""
    difference: bool = False
    """What counts is ours - peer, in ``unit``; target and spread too."""
    spread: tuple[float, float] | None = None
    """Smallest and largest ratio (or difference) of a single round."""
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over the peer's (or as ``inverse`` and ``difference`` say): what the target is about."""
        if self.difference:
            return self.ours - self.peer
        top, bottom = (self.peer, self.ours) if self.inverse else (self.ours, self.peer)
        return top / bottom if bottom else math.nan

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        slack = 1e-9
        return self.ratio >= self.target - slack if self.at_least else self.ratio <= self.target + slack


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of one benchmark."""

    name: str
    title: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    headline: Mapping[str, float] = field(default_factory=dict)
    """Counts that stand at the top of the JSON. A report with one depends on no machine and names none."""


def interleaved(
    variants: Mapping[str, Callable[[], float]], rounds: int = ROUNDS, warm_up: int = 1
) -> dict[str, list[float]]:
    """Run each variant once per round, in turn; a variant returns its own measure (such as seconds)."""
    values: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for index in range(warm_up + rounds):
        first = index % len(names)  # so that none always comes after the same other
        for name in names[first:] + names[:first]:
            value = variants[name]()
            if index >= warm_up:
                values[name].append(value)
    return values


def timed_row(
    name: str, ours: Sequence[float], peer: Sequence[float], unit: str = "s", **options: Any
) -> Row:
    """Minima compared, with the spread of the rounds' own ratios."""
    rounds = [
        Row(name=name, ours=o, peer=p, unit=unit, **options).ratio for o, p in zip(ours, peer, strict=True)
    ]
    return Row(
        name=name, ours=min(ours), peer=min(peer), unit=unit, spread=(min(rounds), max(rounds)), **options
    )


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"minimum": min(values), "median": statistics.median(values), "maximum": max(values)}


def stopwatch(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def number(value: float, unit: str) -> str:
    """A value in its unit, three significant digits."""
    if unit == "s":
        return f"{value * 1e3:.1f} ms" if abs(value) < 1 else f"{value:.2f} s"
    if unit == "B":
        return f"{value:,.0f} B" if abs(value) < 1e6 else f"{value / 1e6:,.2f} MB"
    return f"{value:,.4g}" + (f" {unit}" if unit else "")


def _shown(row: Row, value: float, digits: int = 3) -> str:
    """A ratio, or a difference in its unit."""
    return f"{value:+.{digits}f} {row.unit}" if row.difference else f"{value:.{digits}f}"


def table(report: Report) -> list[list[str]]:
    """Header and rows, as text."""
    lines = [["what", "ours", "peer", "ratio", "single rounds", "target", ""]]
    for row in report.rows:
        spread = " to ".join(_shown(row, value, 2) for value in row.spread) if row.spread else "exact"
        target = "" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:g}"
        target += f" {row.unit}" if target and row.difference else ""
        met = "" if row.met is None else "met" if row.met else "missed"
        name = f"{row.name} ({row.note})" if row.note else row.name
        lines.append(
            [name, number(row.ours, row.unit), number(row.peer, row.unit), _shown(row, row.ratio), spread,
             target, met]
        )  # fmt: skip
    return lines


def as_text(report: Report) -> str:
    """The table for a terminal."""
    lines = table(report)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rendered = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in lines]  # fmt: skip
    rendered.insert(1, "-" * max(map(len, rendered)))
    return "\n".join([report.title, *rendered, *(f"  {remark}" for remark in report.remarks)])


def as_markdown(report: Report) -> str:
    """The table for docs/performance.md."""
    header, *body = table(report)
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(line) + " |" for line in body]
    remarks = [f"- {remark}" for remark in report.remarks]
    if any(row.spread for row in report.rows):
        on = machine()
        remarks.append(f"- Measured on {on['cpu']}, {on['cores']} cores, torch {on['torch']}.")
    return "\n".join([f"### {report.title}", "", *lines, "", *remarks]).rstrip() + "\n"


def fill_tables(document: Path, output_dir: Path, parts: Sequence[str]) -> None:
    """Put the tables in ``output_dir`` between the document's markers, ``<!-- step: begin -->`` and so on."""
    text = document.read_text(encoding="utf-8")
    for part in parts:
        begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->"
        before, found, rest = text.partition(begin)
        _, also_found, after = rest.partition(end)
        if not found or not also_found:
            raise DataError(f"{document} has no markers {begin.strip()} and {end}: put them back")
        text = before + begin + (output_dir / f"{part}.md").read_text(encoding="utf-8") + end + after
    document.write_text(text, encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import transformers

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": os.getloadavg()[0],
    }


def write(report: Report, output_dir: Path) -> list[Path]:
    """JSON, markdown table and chart; returns the files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    document = {
        "name": report.name,
        "title": report.title,
        **(dict[str, Any](report.headline) or {"machine": machine()}),
        "rows": [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in report.rows],
        "remarks": report.remarks,
        "data": report.data,
    }
    paths = [output_dir / f"{report.name}{suffix}" for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    paths[1].write_text(as_markdown(report), encoding="utf-8")
    return paths if draw(report, paths[2]) else paths[:2]


def draw(report: Report, path: Path) -> bool:
    """A bar per ratio, the spread of single rounds and the target on it; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in reversed(report.rows) if math.isfinite(row.ratio)]
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.55 * len(rows)), layout="constrained")
    colours = {True: "#2a7f62", False: "#b5443a", None: "#7a8793"}
    for place, row in enumerate(rows):
        axes.barh(place, row.ratio, height=0.6, color=colours[row.met])
        if row.spread:  # cut at the axis where a disturbed round lies far out
            axes.plot(row.spread, (place, place), color="black", linewidth=1.2)
        if row.target is not None:
            axes.plot((row.target, row.target), (place - 0.4, place + 0.4), color="black", linestyle=":")
        axes.text(
            1.01, place, _shown(row, row.ratio), va="center", fontsize=8, transform=axes.get_yaxis_transform()
        )
    names = [textwrap.fill(row.name, 44) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.set_xlabel(
        "ratio or seconds; green: target met, red: missed, grey: no target; dotted: target; line: rounds",
        fontsize=8,
    )
    axes.set_title(report.title, fontsize=10)
    largest = max((value for row in rows for value in (row.ratio, row.target or 0.0)), default=1.0)
    smallest = min((row.ratio for row in rows), default=0.0)
    axes.set_xlim(min(0.0, 1.18 * smallest), 1.18 * largest)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
