#!/usr/bin/env python3
"""Store a teacher's most likely tokens for a run's stream, to distil from them without the teacher.

    scripts/teacher_targets.py --targets FOLDER --teacher-path TEACHER [flags of resume_pretrain_tensor.py]

Takes the run's own flags (data, tokenizer, block size, model, steps, checkpoint), so that the samples are the
run's: from where it would begin now to the end of its steps, or --samples of them. For each token the --top-k
most likely ids are stored with their log-probabilities at --distill-temperature, and the mass of the rest.
Started again it goes on where it stopped. Under torchrun the ranks of one host share the samples, each with a
whole teacher (--teacher-device-map local), or have one together (tensor-parallel). The run then takes
--teacher-targets FOLDER in place of --teacher-path.

--top-k 64 takes 388 bytes a token with ids of 32 bits, ten billion tokens within 4 TB; twice as many take
twice as much. What more ids could still teach is weighed by the mean mass of the rest, printed at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.command_line import SILENT_SECONDS, parse_recipe
from argonne.config.distillation import TOP_K
from argonne.config.options import AUTO
from argonne.config.recipe import Recipe
from argonne.errors import EXIT_USAGE
from argonne.run.processes import end_with
from argonne.tools.script import OneLineParser, run_script

DTYPES = {"fp16": "float16", "fp32": "float32"}


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--targets", type=Path, metavar="FOLDER", help="where they are stored (required)")
    parser.add_argument("--top-k", type=int, default=TOP_K, help=f"ids stored of each token ({TOP_K})")
    parser.add_argument(
        "--samples", type=int, help="samples in all (what the run's steps take, of one replica)"
    )
    parser.add_argument(
        "--targets-dtype", choices=tuple(DTYPES), default="fp16", help="of the log-probabilities (fp16)"
    )
    return parser


def own_problems(own: argparse.Namespace, recipe: Recipe) -> list[str]:
    """What is wrong beside the run's own flags."""
    problems = [
        f"{name} {value}: must be at least 1"
        for name, value in (("--top-k", own.top_k), ("--samples", own.samples))
        if value is not None and value < 1
    ]
    if own.targets is None:
        problems.append("--targets is required: give the folder where they are stored")
    if recipe.config.distillation.teacher_path is None:
        problems.append("--teacher-path is required: give the folder of the teacher to ask")
    automatic = recipe.config.parallel.tensor_parallel_size == AUTO
    if automatic and own.samples is None and recipe.config.training.global_batch_size is None:
        problems.append(
            f"--tensor-parallel-size {AUTO} counts --batch-size per GPU of the run, which is not known here: "
            "give --global-batch-size, or --samples"
        )
    for name, given in (
        ("--plan", recipe.config.planning.plan),
        ("--rehearse", recipe.config.recipe.rehearse),
    ):
        if given:
            problems.append(f"{name} is the run's: leave it out, or give it to resume_pretrain_tensor.py")
    if len(recipe.stages) > 1:
        problems.append(
            "--config: targets are of one stream, and the recipe has several stages: make one run"
        )
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    own, flags = build_parser().parse_known_args(argv)
    recipe = parse_recipe(flags)
    if problems := own_problems(own, recipe):
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        else:
            time.sleep(SILENT_SECONDS)  # the first rank to end makes torchrun kill the others
        return EXIT_USAGE

    def work() -> None:
        from argonne.ranks.launch import Environment
        from argonne.tools.target_making import Asked, make_targets

        environment = Environment.read(recipe.config.parallel.local_rank)
        asked = Asked(
            folder=own.targets.expanduser(),
            top_k=own.top_k,
            dtype=DTYPES[own.targets_dtype],
            samples=own.samples,
        )
        summary = make_targets(recipe, asked, environment)
        if environment.rank == 0:
            print(summary)

    return run_script(work, debug=recipe.config.debug)


if __name__ == "__main__":
    end_with(main)
