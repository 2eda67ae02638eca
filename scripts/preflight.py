#!/usr/bin/env python3
"""Check everything that a long run needs, before it starts: scripts/preflight.py takes the run's own flags.

    torchrun --standalone --nproc_per_node=8 scripts/preflight.py --tokenizer-path PATH [flags ...]

Started as the run will be (torchrun, or plain python for one process), on all its nodes. Checks endpoint,
flags, devices, clocks, tokenizer, every shard's footer, checkpoint and vocabulary, layout, validation sets,
memory by the plan, disk, bandwidth of the collectives, and two steps of the run itself. Prints one table
(check, ok or FAIL, what was found or the remedy) and leaves nothing in the output folder.

Exit code 0: every check held; 1: one did not; 2: wrong flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.command_line import parse_recipe
from argonne.errors import RunError
from argonne.run.processes import end_with
from resume_pretrain_tensor import prepare_gpus


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    recipe = parse_recipe(arguments)

    from argonne.ranks.launch import Environment

    try:
        environment = Environment.read(recipe.config.parallel.local_rank)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    prepare_gpus(recipe.config, environment)
    from argonne.tools.preflight import preflight

    return preflight(recipe, environment)


if __name__ == "__main__":
    end_with(main)
