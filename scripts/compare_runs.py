#!/usr/bin/env python3
"""Compare two runs, or the runs of two checkouts, step by step: a refactor keeps the loss bitwise.

    python scripts/compare_runs.py RUN_A RUN_B                 # metrics files, or the --output-dir of runs
    python scripts/compare_runs.py CHECKOUT_A CHECKOUT_B       # the same short runs in both, on the CPU

Two checkouts train argonne-tiny in float32 at tp 1, at tp 2 with sequence parallelism, at tp 2 x dp 2, and
resumed at tp 2 from the checkpoint of tp 1, whose export is compared too; it takes a few minutes.
Prints the first step and figure that differ. Exit code 0: equal; 1: they differ; 2: a wrong argument.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.tools.run_differences import (
    FIGURES,
    compared_figures,
    first_difference,
    metrics_path,
    read_records,
)
from argonne.tools.run_pair import compare_checkouts, is_checkout
from argonne.tools.script import OneLineParser, run_script


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(f"Compare two runs or two checkouts, bit for bit: {', '.join(FIGURES)}.")
    parser.add_argument("first", type=Path, help="metrics file, --output-dir of a run, or checkout")
    parser.add_argument("second", type=Path, help="another of the same kind")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="largest relative difference (0: bit for bit)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="new folder that keeps the checkouts' runs (a temporary one)",
    )
    options = parser.parse_args(arguments)
    if not 0.0 <= options.tolerance < 1.0:
        parser.error(f"--tolerance {options.tolerance:g}: give a number from 0 to below 1")
    for path in (options.first, options.second):
        if not path.exists():
            parser.error(
                f"{path} does not exist: give a metrics file, the --output-dir of a run, or a checkout"
            )
        if not is_checkout(path) and not metrics_path(path).is_file():
            parser.error(f"{path} is neither a checkout nor a run: it has no stats/training_metrics.jsonl")
    if is_checkout(options.first) != is_checkout(options.second):
        parser.error("one is a checkout and the other a run: give two of a kind")
    if options.work_dir is not None and options.work_dir.exists():
        parser.error(f"--work-dir {options.work_dir} exists: give a new folder")
    return options


def compare_metrics(options: argparse.Namespace) -> str | None:
    first, second = read_records(options.first), read_records(options.second)
    print(f"compared: {', '.join(compared_figures(first, second))}")
    found = first_difference(first, second, tolerance=options.tolerance)
    if found is None:
        print(f"equal in {len(first)} steps")
    return found


def compare_trees(options: argparse.Namespace, work: Path) -> str | None:
    print(f"compared: {', '.join(FIGURES)}; exported tensors")
    return compare_checkouts(
        options.first.resolve(),
        options.second.resolve(),
        work.resolve(),
        tolerance=options.tolerance,
        say=lambda line: print(line, flush=True),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    def work() -> str | None:
        if not is_checkout(options.first):
            return compare_metrics(options)
        if options.work_dir is not None:
            return compare_trees(options, options.work_dir)
        with tempfile.TemporaryDirectory(prefix="compare_runs_") as folder:
            return compare_trees(options, Path(folder))

    def differ() -> str | None:
        found = work()
        return None if found is None else f"the runs differ: {found}"

    return run_script(differ)


if __name__ == "__main__":
    sys.exit(main())
