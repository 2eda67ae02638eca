#!/usr/bin/env python3
"""Watch a running job in a terminal, from its files alone, on any machine that sees the folder.

    scripts/watch.py OUTPUT_DIR [--interval SECONDS] [--once]

Shows state, progress and time to go, loss, validations, rate, gradient norm, memory and the newest
checkpoint; ends when the run has. On a terminal the screen is redrawn; elsewhere each round is printed below
the last.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import DataError
from argonne.files import OutputFolder, read_json
from argonne.tools.run_watch import view
from argonne.tools.script import OneLineParser, run_script

CLEAR = "\033[H\033[2J"


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("Watch a running job in a terminal, from its files alone.")
    parser.add_argument("run", type=Path, metavar="OUTPUT_DIR", help="--output-dir of the run")
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="between two looks (5)"
    )
    parser.add_argument("--once", action="store_true", help="print the state now and end")
    options = parser.parse_args(argv)
    if options.interval <= 0:
        parser.error(f"--interval {options.interval} must be above 0")
    return run_script(lambda: watch(options.run, options.interval, once=options.once))


def watch(folder: Path, interval: float, *, once: bool) -> None:
    """Print the run's state until it ends; DataError where the folder is no run's."""
    if not OutputFolder(folder).stats.is_dir():
        raise DataError(f"{folder} has no stats/: give the --output-dir of a run")
    redraw = sys.stdout.isatty() and not once
    plain = not (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith("utf")
    while True:
        state = (read_json(OutputFolder(folder).status) or {}).get("state")
        try:
            lines = view(folder, width=shutil.get_terminal_size().columns, plain=plain)
        except DataError as error:
            if once or state in ("finished", "stopped", "failed"):
                raise
            lines = [str(error)]
        print((CLEAR if redraw else "") + "\n".join(lines), flush=True)
        if once or state in ("finished", "stopped", "failed"):
            return
        time.sleep(interval)


if __name__ == "__main__":
    sys.exit(main())
