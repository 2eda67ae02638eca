#!/usr/bin/env python3
"""Branch a run: a new run folder from any kept checkpoint, without copying it, under changed flags.

    scripts/branch_run.py RUN NEW --step N [--config RECIPE] [flags of resume_pretrain_tensor.py]
    scripts/branch_run.py RUN NEW --exclude-documents FILE

RUN is a run's --output-dir, NEW the folder to make. The checkpoint becomes a hard link (a copy where the
filesystem refuses), the records of steps 1 to N come along, and stats/run_config.toml of NEW holds the run's
configuration with the flags that follow; stats/branch.json says where the branch came from and what was
changed. The command that starts it is printed. RUN is not touched. A cooldown branch of a WSD run:

    scripts/branch_run.py RUN NEW --step 9000 --total-steps 10000 --lr-schedule wsd --cooldown-steps 1000

With --exclude-documents and no --step the branch begins at the last kept checkpoint that had seen none of the
documents that are new in the list; a --step that had seen one is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError
from argonne.tools.branch import branch_recipe, make_branch, require_new
from argonne.tools.branch_step import choose_step
from argonne.tools.kept_run import KeptRun
from argonne.tools.script import OneLineParser, run_script


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output-dir of a run")
    parser.add_argument("new", type=Path, metavar="NEW", help="the folder of the branch")
    parser.add_argument(
        "--step",
        type=int,
        help="the kept checkpoint to begin at (with --exclude-documents: the last from before them)",
    )
    parser.add_argument("--config", metavar="FILE", help="a recipe in place of the run's own")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options, flags = build_parser().parse_known_args(argv)

    def work() -> None:
        run = KeptRun(options.run)
        if options.step is not None and options.step < 0:
            raise ConfigError(f"--step {options.step} is negative: give the step of a kept checkpoint")
        require_new(options.new)
        recipe = branch_recipe(run, options.new, options.config, flags)
        step = choose_step(run, recipe, options.step)
        print("\n".join(make_branch(run, options.new, step, recipe)))

    return run_script(work)


if __name__ == "__main__":
    sys.exit(main())
