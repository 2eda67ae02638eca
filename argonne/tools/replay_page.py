"""A replayed step as an HTML page that needs nothing else, every text escaped, and as a terminal's lines."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from pathlib import Path

from argonne.errors import RunError
from argonne.tools.replay_result import MeasuredDocument, Replay

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: #1f2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { text-align: left; padding: .2rem .8rem .2rem 0;
  vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; background: #f5f6f8; padding: .6rem; border-radius: .3rem }
"""
RANKINGS: tuple[tuple[str, Callable[[MeasuredDocument], float]], ...] = (
    ("by loss", lambda found: found.loss),
    ("by gradient norm", lambda found: found.grad_norm),
)


def ranked(replay: Replay, key: Callable[[MeasuredDocument], float]) -> list[MeasuredDocument]:
    """The documents, the largest first; a figure that is no number comes before all."""
    return sorted(replay.documents, key=lambda found: (key(found) == key(found), -key(found)))


def verdict(replay: Replay) -> str:
    """Whether it is the same step, in words."""
    if replay.exact:
        return "the same step, bit for bit"
    if not replay.same:
        wrong = ", ".join(figure.name for figure in replay.figures if not figure.same)
        return f"not the same step: {wrong} differ"
    tolerance = max(figure.tolerance for figure in replay.figures)
    why = "" if not replay.same_layout else "; the number of threads, the device or the libraries differ"
    return f"the same step within {tolerance:g} (relative) of the recorded loss and gradient norm{why}"


def terminal_lines(replay: Replay, most: int = 5) -> Iterable[str]:
    """The proof and the first documents of each ranking."""
    yield f"Step {replay.step} from {replay.checkpoint}, {replay.layout}"
    for figure in replay.figures:
        yield f"{figure.name}: recorded {figure.recorded}, replayed {figure.replayed}"
    yield f"Result: {verdict(replay)}"
    for title, key in RANKINGS:
        for number, found in enumerate(ranked(replay, key)[:most], 1):
            start = " ".join(found.text.split())[:60]
            yield (
                f"{title} {number}: loss {found.loss:.4f}, gradient norm {found.grad_norm:.4g}, "
                f"{found.document.tokens} tokens, {found.document.place()}: {start}"
            )


def write_page(replay: Replay, output: Path) -> None:
    """Write the page; raises RunError where it cannot be written."""
    title = html.escape(f"Step {replay.step}")
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
        f"<p>From {html.escape(replay.checkpoint)}, {html.escape(replay.layout)}: "
        f"<b>{html.escape(verdict(replay))}</b></p>",
        "<table><tr><th>figure</th><th>recorded</th><th>replayed</th></tr>",
        *(
            f"<tr><td>{figure.name}</td><td>{html.escape(str(figure.recorded))}</td>"
            f"<td>{html.escape(str(figure.replayed))}</td></tr>"
            for figure in replay.figures
        ),
        "</table>",
        *(f"<p>{html.escape(note)}</p>" for note in replay.notes),
        *_rankings(replay),
        "</body></html>",
    ]
    try:
        output.write_text("\n".join(parts), encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{output} cannot be written ({error.strerror}): give another --output") from error


def _rankings(replay: Replay) -> Iterable[str]:
    for title, key in RANKINGS:
        yield f"<h2>Documents {title}</h2>"
        yield "<table><tr><th></th><th>loss</th><th>gradient norm</th><th>tokens</th><th>document</th></tr>"
        for number, found in enumerate(ranked(replay, key), 1):
            yield (
                f"<tr><td class='number'>{number}</td><td class='number'>{found.loss:.4f}</td>"
                f"<td class='number'>{found.grad_norm:.4g}</td>"
                f"<td class='number'>{found.document.tokens:,}</td>"
                f"<td><details><summary>{html.escape(found.document.place())}</summary>"
                f"<pre>{html.escape(found.text)}</pre></details></td></tr>"
            )
        yield "</table>"
