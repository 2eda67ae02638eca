"""The console of a run: lines on stdout, warnings on stderr, a bar where stderr is a terminal.

It never ends a run: a closed stdout, a vanished terminal or a full disk costs lines, with one warning.
"""

import os
import sys
from collections import Counter
from typing import Any, TextIO

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Console:
    """Rank 0's; on the other ranks (not ``active``) each call returns at once."""

    def __init__(self, *, active: bool) -> None:
        self.active = active
        self.warnings: Counter[str] = Counter()
        """Each warning, and how often it came."""
        self._bar: Any = None

    def info(self, text: str) -> None:
        """Print one line on stdout, above the bar where there is one."""
        if self.active:
            self._print(text, "stdout")

    def warn(self, text: str, detail: str = "") -> None:
        """Print ``warning: text`` the first time; count further times (``detail`` may differ)."""
        if not self.active:
            return
        self.warnings[text] += 1
        if self.warnings[text] == 1:
            self._print(f"warning: {text}{' ' if detail else ''}{detail}", "stderr")

    def repeat_warnings(self) -> None:
        """Say of each warning that came more than once how often it did."""
        for text, count in self.warnings.items():
            if count > 1:
                self._print(f"warning: {count} times: {text}", "stderr")

    def open_bar(self, first_step: int, total_steps: int) -> None:
        """Show a bar where stderr is a terminal."""
        if not self.active or sys.stderr is None or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        self._bar = tqdm(
            initial=first_step,
            total=total_steps,
            unit="step",
            dynamic_ncols=True,
            bar_format=_BAR,
            file=sys.stderr,
        )

    def move_bar(self, step: int, text: str) -> None:
        """``step`` steps are complete; ``text`` stands behind the bar."""
        if self._bar is None:
            return
        try:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        except OSError:  # the terminal is gone
            self._bar = None

    def close(self) -> None:
        """Close the bar; calling it again does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str, stream_name: str) -> None:
        stream: TextIO | None = getattr(sys, stream_name)
        if stream is None:
            return
        try:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()
        except (OSError, ValueError) as error:
            _silence(stream, stream_name)
            if stream_name == "stdout":
                self.warn(f"stdout cannot be written ({error}): training goes on without it")


def _silence(stream: TextIO, stream_name: str) -> None:
    """Send a stream that broke to nowhere, so that neither the next line nor the exit's flush fails."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        setattr(sys, stream_name, None)
