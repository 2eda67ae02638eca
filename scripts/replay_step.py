#!/usr/bin/env python3
"""Do a past step of a run again, prove that it is the same, and rank its documents.

    scripts/replay_step.py RUN --step N [--output FILE.html] [--from-start]

RUN is a run's --output-dir, N a step as its metrics count them. The run is rebuilt from the nearest kept
checkpoint before N, with the flags of stats/run_config.toml, on this process (or under torchrun on any layout
of the run's model), and led to step N. Stream hash, loss and gradient norm must be the recorded ones: bit for
bit at the run's layout on a CPU, else within 1e-3 (float32) or 5e-2 (lower precision), relative. The step's
documents are ranked by loss and by gradient norm, with text and place, on an HTML page and in short on the
terminal. Nothing is written into RUN.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError, RunError
from argonne.run.processes import end_with
from argonne.tools.kept_run import KeptRun
from argonne.tools.script import OneLineParser, run_script, said_by_rank_0
from resume_pretrain_tensor import prepare_gpus


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="the --output-dir of a run")
    parser.add_argument("--step", type=int, required=True, help="the step, from 1, as the metrics count them")
    parser.add_argument("--output", type=Path, help="the page (step_N.html in the current folder)")
    parser.add_argument(
        "--from-start", action="store_true", help="begin with the initial weights, not with a checkpoint"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    output = options.output or Path(f"step_{options.step}.html")

    def work() -> None:
        if output.resolve().is_relative_to(options.run.resolve()):
            raise ConfigError(
                f"--output {output} lies in the run's folder, which is not touched: name another"
            )
        run = KeptRun(options.run)
        recipe = run.recipe()

        from argonne.ranks.launch import Environment

        environment = Environment.read(recipe.config.parallel.local_rank)
        prepare_gpus(recipe.config, environment)
        from argonne.ranks.world import disconnect
        from argonne.run.control import RunControl
        from argonne.tools.preflight import QuietReport, join
        from argonne.tools.replay import replay
        from argonne.tools.replay_page import terminal_lines, verdict, write_page

        world, _ = join(recipe, environment)
        with tempfile.TemporaryDirectory(prefix="argonne-replay-") as folder:
            report = QuietReport(Path(folder), rank=world.rank)
            control = RunControl(
                Path(folder),
                rank=world.rank,
                world_size=world.world_size,
                launch=environment.launch,
                warn=report.warn,
            )
            parts = (control, report, world)
            with said_by_rank_0(world.rank):
                found = replay(run, recipe, options.step, Path(folder), parts, from_start=options.from_start)
        disconnect()
        if world.rank == 0:
            print("\n".join(terminal_lines(found)))
            write_page(found, output)
            print(f"written: {output}")
        with said_by_rank_0(world.rank):
            if not found.same:
                raise RunError(verdict(found))

    return run_script(work)


if __name__ == "__main__":
    end_with(main)
