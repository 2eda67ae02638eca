"""How a script begins and ends: its command line, its one line of error, its exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from argonne.config.command_line import SILENT_SECONDS
from argonne.errors import EXIT_FAILURE, EXIT_USAGE, RunError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGINT or SIGPIPE ends."""


class OneLineParser(argparse.ArgumentParser):
    """Says ``error: ...`` in one line and leaves with code 2, without the list of all flags."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(EXIT_USAGE)


class Repeated(argparse.Action):
    """A flag whose values add up; the first one given replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (values,) if before is self.default else (*before, values))


def silence_stdout() -> None:
    """Send to nowhere what is printed from now on, and what is buffered: stdout's reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_script(work: Callable[[], str | None], *, debug: bool = False) -> int:
    """Do a script's work, which prints its results, and return the exit code.

    ``work`` returns None, or in words what it found to be wrong: that is printed as an error, code 1. So is a
    RunError, with its own code; ``debug`` lets it through with its traceback. A reader of stdout that has
    left (``| head``) and Ctrl-C end the script without a word.
    """
    try:
        wrong = work()
        sys.stdout.flush()  # here, and not when Python ends, is where a reader's leaving can be caught
    except RunError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        silence_stdout()
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return EXIT_FAILURE
    return 0


@contextmanager
def said_by_rank_0(rank: int) -> Iterator[None]:
    """An error that all ranks raise is rank 0's to say: the others end with its code, without a word."""
    try:
        yield
    except RunError as error:
        if rank == 0:
            raise
        time.sleep(SILENT_SECONDS)  # the first rank to end makes torchrun kill the others: let rank 0 print
        raise SystemExit(error.exit_code) from error
