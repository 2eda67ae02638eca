"""Measure this suite beside its peers, in one run each, and compare the ratios with their targets.

    python scripts/benchmark.py step            # optimizer step against DTensor and against one process
    python scripts/benchmark.py memory          # parameters, saved activations, loss
    python scripts/benchmark.py collectives     # calls and bytes against the formula and DTensor's
    python scripts/benchmark.py traffic         # bytes that a GPU's rank moves outside its products
    python scripts/benchmark.py data | checkpoint | startup | audit
    python scripts/benchmark.py gpu             # one GPU: kernels, a rank's share of tp 8, the model at tp 1
    python scripts/benchmark.py gpu-runs        # all GPUs: real runs, each beside the plan's prediction
    python scripts/benchmark.py all             # all but the GPUs', and the tables of docs/performance.md

Each prints a table with the ratio and its target, and leaves JSON, a markdown table and a chart in
``--output-dir``. The variants of a timed comparison take turns in each round, and minima are compared, so
that the ratios hold on a machine that others use too. Exit code 0: measured (also where a target is missed);
1: could not measure; 2: a wrong flag.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from argonne.ranks.gpu_environment import set_gpu_environment  # noqa: E402
from argonne.tools.script import OneLineParser, run_script  # noqa: E402

if TYPE_CHECKING:
    from argonne.benchmarks.common import Report

DOCUMENT = ROOT / "docs" / "performance.md"
PARTS = {
    "step": "argonne.benchmarks.step",
    "memory": "argonne.benchmarks.memory",
    "collectives": "argonne.benchmarks.collectives",
    "traffic": "argonne.benchmarks.traffic",
    "data": "argonne.benchmarks.data",
    "checkpoint": "argonne.benchmarks.checkpoint",
    "startup": "argonne.benchmarks.startup",
    "audit": "argonne.benchmarks.audit",
    "gpu": "argonne.benchmarks.gpu",
    "gpu-runs": "argonne.benchmarks.gpu_runs",
}
ON_GPUS = ("gpu", "gpu-runs")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("Measure this suite beside its peers and compare the ratios with their targets.")
    parser.add_argument(
        "part", choices=[*PARTS, "all"], help="what to measure; all: all but gpu and gpu-runs"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("benchmarks"), metavar="FOLDER", help="(./benchmarks)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each timed comparison (9)")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="of gpu, gpu-runs (cuda); cpu tests them",
    )
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give at least 1 (7 and more for numbers to keep)")
    return options


def run_part(part: str, rounds: int, device: str) -> Report:
    module = importlib.import_module(PARTS[part])
    return module.run(rounds, device) if part in ON_GPUS else module.run(rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.part == "gpu":
        set_gpu_environment(os.environ, one_queue=True)  # a rank's share of tp 8
    from argonne.benchmarks.common import as_text, fill_tables, write

    parts = [part for part in PARTS if part not in ON_GPUS] if options.part == "all" else [options.part]

    def measure(part: str) -> None:
        report = run_part(part, options.rounds, options.device)
        print(as_text(report), flush=True)
        print("  -> " + ", ".join(map(str, write(report, options.output_dir))) + "\n", flush=True)

    def work() -> str | None:
        if options.part != "all":
            measure(options.part)
            return None
        failed = []
        for part in parts:
            try:
                measure(part)
            except Exception:  # noqa: BLE001 - one part that fails must not cost the half hour of the others
                traceback.print_exc()
                failed.append(part)
        fill_tables(DOCUMENT, options.output_dir, [part for part in parts if part not in failed])
        print(f"tables of {DOCUMENT.relative_to(ROOT)} rewritten")
        return f"not measured, for the reasons above: {', '.join(failed)}" if failed else None

    return run_script(work, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
