"""The history of runs as one HTML page that needs nothing else: curves, totals, events, validations, samples.

Every text is escaped: names of runs and sources, reasons and generated samples may hold anything.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from argonne.errors import RunError
from argonne.tools.run_history import AXES, Event, RunHistory
from argonne.tools.training_figure import panel_svg, shown_panels

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1f2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(32rem, 1fr)); gap: 1rem }
.panels svg { width: 100%; height: auto }
table { border-collapse: collapse } th, td { text-align: left; padding: .2rem .8rem .2rem 0 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; background: #f5f6f8; padding: .6rem; border-radius: .3rem }
section.axis { display: none } nav label { margin-right: 1rem }
#show-step:checked ~ section.step, #show-tokens:checked ~ section.tokens, #show-time:checked ~ section.time
{ display: block }
"""
_AXIS_NAMES = {"step": "by step", "tokens": "by tokens", "time": "by time"}


def write_page(
    runs: Sequence[RunHistory], marks: Sequence[Event], output: Path, samples: Path | None
) -> None:
    """Write the page; raises RunError where it cannot be written."""
    title = ", ".join(run.name for run in runs)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        _table(("run", "state", "step", "tokens", "loss", "reason"), map(_totals, runs)),
        *_panels(runs, marks),
        *_events(runs[0], marks),
        *_validations(runs),
        *_samples(samples),
        "</body></html>",
    ]
    try:
        output.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{output} cannot be written ({error.strerror}): give another --output") from error


def _totals(run: RunHistory) -> tuple[Any, ...]:
    last = run.steps[-1]
    status = run.status
    return (
        run.name,
        status.get("state") or "",
        last["step"],
        last.get("tokens_processed") or 0,
        last.get("loss") if last.get("loss") is not None else "",
        status.get("reason") or "",
    )


def _panels(runs: Sequence[RunHistory], marks: Sequence[Event]) -> Iterable[str]:
    for axis in AXES:
        checked = " checked" if axis == "step" else ""
        yield f"<input type='radio' name='axis' id='show-{axis}'{checked}>"
        yield f"<label for='show-{axis}'>{_AXIS_NAMES[axis]}</label>"
    for axis in AXES:
        yield f"<section class='axis {axis}'><div class='panels'>"
        for panel in shown_panels(runs, axis):
            # Ids inside the drawings would meet each other on one page.
            yield panel_svg(panel, runs, axis, marks) or f"<p>{panel.title}: matplotlib is not installed</p>"
        yield "</div></section>"


def _events(run: RunHistory, marks: Sequence[Event]) -> Iterable[str]:
    events = sorted((*run.events(), *marks), key=lambda event: event.step)
    if events:
        yield "<h2>Events</h2>"
        yield _table(("step", "what"), ((event.step, event.text) for event in events))


def _validations(runs: Sequence[RunHistory]) -> Iterable[str]:
    rows = [
        (run.name, line["name"], line["step"], line.get("loss"), line.get("bits_per_byte"))
        for run in runs
        for line in run.validations
    ]
    if rows:
        yield "<h2>Validation</h2>"
        yield _table(("run", "set", "step", "loss", "bits per byte"), rows[-50:])


def _samples(path: Path | None) -> Iterable[str]:
    """The last samples of ``stats/samples.jsonl``."""
    if path is None or not path.exists():
        return
    yield "<h2>Samples</h2>"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]:
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        yield f"<p>step {html.escape(str(sample.get('step')))}</p>"
        yield f"<pre>{html.escape(str(sample.get('text')))}</pre>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        return f"<td class='number'>{text}</td>"
    return f"<td>{html.escape(str(value if value is not None else ''))}</td>"
