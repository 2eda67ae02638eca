#!/usr/bin/env python3
"""Draw what runs have recorded: a picture, a page, and a line of blocks in the terminal.

    scripts/plot_training.py RUN [RUN ...] [--x step|tokens|time] [--mark STEP=TEXT ...] [--output FILE]

RUN is a run's --output-dir (or its training_metrics.jsonl); several are drawn over each other. Panels: loss,
loss by source, validation, learning rate, gradient norm, throughput, utilization, memory; resumes, stages
and skipped steps are marked. --output may end in .png, .svg or .html (one page with everything by step,
tokens and time); left out, RUN/stats/training.png and training.html. Without matplotlib only the terminal's
line is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError
from argonne.files import OutputFolder
from argonne.tools.run_history import AXES, Event, RunHistory, read_history, smoothed, sparkline
from argonne.tools.script import OneLineParser, run_script
from argonne.tools.training_figure import draw
from argonne.tools.training_page import write_page

SUFFIXES = (".png", ".svg", ".html")


def terminal_lines(run: RunHistory, marks: Sequence[Event], width: int = 60) -> list[str]:
    """The sparkline with its ends, and a line that points at each mark."""
    losses = [float(record["loss"]) for record in run.steps if record.get("loss") is not None]
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    line = sparkline(losses, width, plain=not encoding.startswith("utf"))
    lines = [f"loss {losses[0]:.2f} {line} {smoothed(losses)[-1]:.2f}"]
    first, last = run.steps[0]["step"], run.steps[-1]["step"]
    for mark in marks:
        if first <= mark.step <= last:
            column = (mark.step - first) * len(line) // (last - first + 1)
            lines.append(" " * (len(f"loss {losses[0]:.2f} ") + column) + f"^ step {mark.step}: {mark.text}")
    return lines


def parse_mark(text: str) -> Event:
    """``120=stopped here`` as an event; raises ConfigError."""
    step, separator, label = text.partition("=")
    if not separator or not step.isdigit():
        raise ConfigError(f"--mark {text}: give STEP=TEXT")
    return Event(step=int(step), text=label)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("Draw what runs have recorded.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="--output-dir of a run, or its metrics"
    )
    parser.add_argument(
        "--x", choices=AXES, default="step", help="axis of a picture: step, tokens or hours (step)"
    )
    parser.add_argument(
        "--output", type=Path, help="the file, .png, .svg or .html (RUN/stats/training.png and .html)"
    )
    parser.add_argument("--mark", action="append", default=[], metavar="STEP=TEXT", help="line at a step")
    options = parser.parse_args(argv)
    if options.output is not None and options.output.suffix not in SUFFIXES:
        parser.error(f"--output {options.output}: give a name that ends in {', '.join(SUFFIXES)}")

    def work() -> None:
        marks = [parse_mark(text) for text in options.mark]
        runs = [read_history(path) for path in options.runs]
        for run in runs:
            print("\n".join(terminal_lines(run, marks)))
        first = options.runs[0]
        folder = OutputFolder(first).stats if first.is_dir() else first.parent
        outputs = [options.output] if options.output else [folder / "training.png", folder / "training.html"]
        for output in outputs:
            if output.suffix == ".html":
                write_page(runs, marks, output, folder / "samples.jsonl")
                print(f"page: {output}")
            elif draw(runs, options.x, marks, output):
                print(f"picture: {output}")
            else:
                print(f"no picture: matplotlib is not installed ({sys.executable} -m pip install matplotlib)")

    return run_script(work)


if __name__ == "__main__":
    sys.exit(main())
