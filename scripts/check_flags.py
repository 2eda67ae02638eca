#!/usr/bin/env python3
"""Check the flags of resume_pretrain_tensor.py without starting a run.

    python scripts/check_flags.py --tokenizer-path PATH [flags ...]

Takes the flags of a run; prints one line for each problem. Exit code 0: sound; 2: not. The launchers run it
before they start any process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.command_line import parse_command_line


def main(argv: Sequence[str] | None = None) -> int:
    parse_command_line(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
