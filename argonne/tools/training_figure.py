"""Curves of one or several runs as a picture (PNG or SVG), a panel for each quantity; needs matplotlib."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.errors import RunError
from argonne.tools.run_history import Event, RunHistory, smoothed

_AXIS_LABELS = {"step": "optimizer step", "tokens": "tokens", "time": "hours of training"}
_MOST_POINTS = 3000
_COLORS = tuple(f"C{index}" for index in range(10))
_EVENT_COLORS = {"resumed": "tab:green", "skipped": "tab:red"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity; ``lines`` gives its curves for a run as (label, x, y, whether also smoothed)."""

    title: str
    unit: str
    lines: Callable[[RunHistory, str], list[tuple[str, list[float], list[float], bool]]]
    logarithmic: bool = False


def _of_key(key: str, scale: float = 1.0, *, smooth: bool = False) -> Any:
    def lines(run: RunHistory, axis: str) -> list[tuple[str, list[float], list[float], bool]]:
        pairs = [
            (x, float(record[key]) * scale)
            for x, record in zip(run.places(axis), run.steps, strict=True)
            if record.get(key) is not None
        ]
        return [("", [x for x, _ in pairs], [y for _, y in pairs], smooth)] if pairs else []

    return lines


def _by_source(run: RunHistory, axis: str) -> list[tuple[str, list[float], list[float], bool]]:
    result = []
    for name in run.sources():
        pairs = [
            (x, float(record["loss_by_source"][name]))
            for x, record in zip(run.places(axis), run.steps, strict=True)
            if (record.get("loss_by_source") or {}).get(name) is not None
        ]
        result.append((name, [x for x, _ in pairs], [y for _, y in pairs], True))
    return result


def _validation(run: RunHistory, axis: str) -> list[tuple[str, list[float], list[float], bool]]:
    place = run.place_of(axis)
    result = []
    for name in run.sets():
        found = [line for line in run.validations if line["name"] == name and line.get("loss") is not None]
        pairs = [(x, float(line["loss"])) for line in found if (x := place(line["step"])) is not None]
        result.append((name, [x for x, _ in pairs], [y for _, y in pairs], False))
    return result


PANELS = (
    Panel(title="Training loss", unit="nats per token", lines=_of_key("loss", smooth=True)),
    Panel(title="Loss by source", unit="nats per token", lines=_by_source),
    Panel(title="Validation loss", unit="nats per token", lines=_validation),
    Panel(title="Learning rate", unit="", lines=_of_key("lr")),
    Panel(
        title="Gradient norm",
        unit="before clipping",
        lines=_of_key("grad_norm", smooth=True),
        logarithmic=True,
    ),
    Panel(title="Throughput", unit="tokens per second", lines=_of_key("tokens_per_second", smooth=True)),
    Panel(title="Model FLOP utilization", unit="%", lines=_of_key("mfu", 100.0, smooth=True)),
    Panel(title="Peak memory of rank 0", unit="GiB", lines=_of_key("peak_memory_bytes", 2.0**-30)),
)


def shown_panels(runs: Sequence[RunHistory], axis: str) -> list[Panel]:
    """The panels for which some run has values."""
    return [panel for panel in PANELS if any(y for run in runs for _, _, y, _ in panel.lines(run, axis))]


def plain(text: str) -> str:
    """Text as matplotlib shall draw it: no mathematics between dollar signs, no hidden leading underscore."""
    return text.replace("$", r"\$").replace("\n", " ").lstrip("_") or " "


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most a few thousand points: means of equal runs of neighbours."""
    size = -(-len(x) // _MOST_POINTS)
    if size <= 1:
        return list(x), list(y)
    starts = range(0, len(x), size)
    return [x[i] for i in starts], [sum(y[i : i + size]) / len(y[i : i + size]) for i in starts]


def draw_panel(
    axes: Any, panel: Panel, runs: Sequence[RunHistory], axis: str, marks: Sequence[Event]
) -> None:
    """Draw one panel's curves; the first run's events are vertical lines, named in the first panel."""
    curves = [(run, *line) for run in runs for line in panel.lines(run, axis)]
    for color, (run, label, x, y, smooth) in zip(_cycled(len(curves)), curves, strict=True):
        name = ", ".join(part for part in (run.name if len(runs) > 1 else "", label) if part)
        if smooth:
            axes.plot(*thinned(x, y), color=color, alpha=0.25, linewidth=0.8)
            y = smoothed(y, max(10.0, len(y) / 100))
        axes.plot(
            *thinned(x, y), color=color, linewidth=1.6, label=plain(name), marker="" if len(x) > 1 else "o"
        )
    _mark_events(axes, runs[0], axis, marks, named=panel is PANELS[0])
    axes.set(title=panel.title, xlabel=_AXIS_LABELS[axis], ylabel=panel.unit)
    if panel.logarithmic and all(value > 0 for *_, y, _ in curves for value in y):
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if any(label for _, label, *_ in curves) or len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)


def _mark_events(axes: Any, run: RunHistory, axis: str, marks: Sequence[Event], *, named: bool) -> None:
    place = run.place_of(axis)
    for event in (*run.events(), *marks):
        at = place(event.step)
        if at is None:
            continue
        color = _EVENT_COLORS.get(event.text, "tab:gray")
        axes.axvline(at, color=color, linestyle="--", linewidth=0.9)
        if named:
            axes.annotate(
                plain(event.text)[:40], (at, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0),
                textcoords="offset points", va="top", color=color, fontsize=8, rotation=90,
            )  # fmt: skip


def _cycled(count: int) -> list[str]:
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


def _pyplot() -> Any:
    """matplotlib's pyplot without a screen; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib import pyplot

    return pyplot


def draw(runs: Sequence[RunHistory], axis: str, marks: Sequence[Event], output: Path) -> bool:
    """Write all panels as one picture; False without matplotlib. RunError where it cannot be written."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    panels = shown_panels(runs, axis)
    rows = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(rows, 2, figsize=(12, 3.4 * rows), layout="constrained", squeeze=False)
    places = list(grid.flat)
    for axes, panel in zip(places, panels, strict=False):
        draw_panel(axes, panel, runs, axis, marks)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    try:
        figure.savefig(output, dpi=130)
    except OSError as error:
        reason = f"{output} cannot be written ({error.strerror})"
        raise RunError(f"{reason}: give another --output") from error
    finally:
        pyplot.close(figure)
    return True


def panel_svg(panel: Panel, runs: Sequence[RunHistory], axis: str, marks: Sequence[Event]) -> str:
    """One panel as an <svg> element for a page; "" without matplotlib."""
    pyplot = _pyplot()
    if pyplot is None:
        return ""
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    draw_panel(axes, panel, runs, axis, marks)
    text = io.StringIO()
    with pyplot.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return drawing[drawing.index("<svg") :]
