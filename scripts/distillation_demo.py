#!/usr/bin/env python3
"""A student alone and beside its teacher, from three seeds: steps to a validation loss, with errors.

    python scripts/distillation_demo.py --output-dir quickstart/distillation

Trains a teacher on the quickstart's corpus, then a student of an eighth of its size, both ways;
some ten minutes on a quiet CPU. Prints a table and writes curves.json and distillation.svg (with matplotlib).
Called again, it goes on where it stopped. Exit code 0: the students beside the teacher were faster; 1: not.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.tools.distillation_demo import ALONE, TAUGHT, Demonstration, Outcome, draw
from argonne.tools.script import OneLineParser, run_script


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("Train a student with and without a teacher, from several seeds, and compare.")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the runs and the outcome")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=400, metavar="N", help="of each student, a multiple of 25 (%(default)s)"
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=800, metavar="N", help="of the teacher (%(default)s)"
    )
    options = parser.parse_args(argv)
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: give at least 2, or there is no error to show")
    if options.steps < 50 or options.steps % 25:
        parser.error(f"--steps {options.steps}: give a multiple of 25 from 50 on")
    if options.teacher_steps < 25:
        parser.error(f"--teacher-steps {options.teacher_steps}: give at least 25")

    def work() -> str | None:
        demonstration = Demonstration(
            folder=options.output_dir,
            seeds=range(options.seeds),
            steps=options.steps,
            teacher_steps=options.teacher_steps,
        )
        options.output_dir.mkdir(parents=True, exist_ok=True)
        curves = demonstration.curves()
        outcome = Outcome.of(curves, demonstration.teacher_loss())
        print(outcome.table())
        print(f"the teacher's own loss: {outcome.teacher_loss:.3f}")
        (options.output_dir / "curves.json").write_text(json.dumps(curves), encoding="utf-8")
        picture = options.output_dir / "distillation.svg"
        print(picture if draw(curves, outcome, picture) else "no picture: matplotlib is not installed")
        alone, taught = (statistics.mean(outcome.steps[side]) for side in (ALONE, TAUGHT))
        return None if taught < alone else "the teacher made no student faster"

    return run_script(work)


if __name__ == "__main__":
    sys.exit(main())
