"""The command line of a script: a mistake is one line, as everywhere in this suite."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says ``error: ...`` in one line and leaves with code 2, without the list of all flags."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)
