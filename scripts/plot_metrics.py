#!/usr/bin/env python3
"""Draw the loss of a run: a PNG, and a line of blocks in the terminal.

    scripts/plot_metrics.py OUTPUT_DIR [--output loss.png] [--mark STEP=TEXT ...]

OUTPUT_DIR is the run's --output-dir (or its training_metrics.jsonl). Without matplotlib only the terminal's
line is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError, DataError, RunError
from argonne.files import OutputFolder
from argonne.tools.script import OneLineParser, run_script

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-=+*#@"
SMOOTHING = 0.9
"""Weight of the past in the smoothed loss, an exponential mean over about ten steps."""

Mark = tuple[int, str]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The finite steps of training_metrics.jsonl in order; DataError where there is none."""
    if path.is_dir():
        path = OutputFolder(path).metrics
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: give the --output-dir of a run") from error
    try:
        records = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DataError(
            f"{path} is not a file of metrics ({error}): give the --output-dir of a run"
        ) from error
    found = [record for record in records if record.get("loss") is not None]
    if not found:
        raise DataError(f"{path} holds no step yet: wait for the run's first step")
    return found


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean, unbiased at the start (as Adam's moments are)."""
    result: list[float] = []
    mean, weight = 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result


def sparkline(values: Sequence[float], width: int = 60, blocks: str = BLOCKS) -> str:
    """Means of ``width`` equal spans as blocks, the lowest mean being the lowest block."""
    width = min(width, len(values))
    spans = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(span) / len(span) for span in spans]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def terminal_lines(records: Sequence[dict[str, Any]], marks: Sequence[Mark], width: int = 60) -> list[str]:
    """The sparkline with its ends, and a line that points at the marks."""
    losses = [float(record["loss"]) for record in records]
    means = smoothed(losses)
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    blocks = BLOCKS if encoding.startswith("utf") else PLAIN_BLOCKS
    line = sparkline(losses, width, blocks)
    lines = [f"loss {losses[0]:.2f} {line} {means[-1]:.2f}"]
    first, last = records[0]["step"], records[-1]["step"]
    for step, text in marks:
        if first <= step <= last:
            column = (step - first) * len(line) // (last - first + 1)
            lines.append(" " * (len(f"loss {losses[0]:.2f} ") + column) + f"^ step {step}: {text}")
    return lines


def draw(records: Sequence[dict[str, Any]], marks: Sequence[Mark], output: Path) -> bool:
    """Write the picture; False where matplotlib is not installed. Raises RunError where it cannot write."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record["step"] for record in records]
    losses = [float(record["loss"]) for record in records]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss of a step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="mean of about ten steps")
    for step, text in marks:
        axes.axvline(step, color="tab:red", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"step {step}: {text}", (step, 0.97), xycoords=("data", "axes fraction"), xytext=(5, 0),
            textcoords="offset points", va="top", color="tab:red", fontsize=9,
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Training loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    try:
        figure.savefig(output, dpi=140)
    except OSError as error:
        reason = f"{output} cannot be written ({error.strerror})"
        raise RunError(f"{reason}: give another --output") from error
    finally:
        pyplot.close(figure)
    return True


def parse_mark(text: str) -> Mark:
    """``120=stopped here`` as (120, "stopped here"); raises ConfigError."""
    step, separator, label = text.partition("=")
    if not separator or not step.isdigit():
        raise ConfigError(f"--mark {text}: give STEP=TEXT")
    return int(step), label


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("Draw the loss of a run.")
    parser.add_argument("run", type=Path, help="--output-dir of the run, or its training_metrics.jsonl")
    parser.add_argument("--output", type=Path, help="the picture, .png or .svg (RUN/stats/loss.png)")
    parser.add_argument("--mark", action="append", default=[], metavar="STEP=TEXT", help="line at a step")
    options = parser.parse_args(argv)
    if options.output is not None and options.output.suffix not in (".png", ".svg"):
        parser.error(f"--output {options.output}: give a name that ends in .png or .svg")
    folder = OutputFolder(options.run).stats if options.run.is_dir() else options.run.parent
    output = options.output or folder / "loss.png"

    def work() -> None:
        marks = [parse_mark(text) for text in options.mark]
        records = read_metrics(options.run)
        print("\n".join(terminal_lines(records, marks)))
        if draw(records, marks, output):
            print(f"drawn in {output}")
        else:
            print(f"no picture: matplotlib is not installed ({sys.executable} -m pip install matplotlib)")

    return run_script(work)


if __name__ == "__main__":
    sys.exit(main())
