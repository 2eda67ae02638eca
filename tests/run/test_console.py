"""The console: lines on stdout, each warning once, and streams that break."""

import io
import sys
from typing import Any

import pytest

from argonne.run.console import Console


class Broken(io.StringIO):
    """A stream that has gone away and has no descriptor."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_lines_go_to_stdout_and_warnings_to_stderr_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=True)
    console.info("a line")
    console.warn("rows were skipped:", "row 1")
    console.warn("rows were skipped:", "row 2")
    console.warn("something else")
    assert capsys.readouterr() == ("a line\n", "warning: rows were skipped: row 1\nwarning: something else\n")
    assert console.warnings == {"rows were skipped:": 2, "something else": 1}
    console.repeat_warnings()
    assert capsys.readouterr() == ("", "warning: 2 times: rows were skipped:\n")


def test_other_ranks_say_and_count_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=False)
    console.info("a line")
    console.warn("a warning")
    console.open_bar(0, 10)
    console.move_bar(1, "loss")
    console.repeat_warnings()
    console.close()
    assert capsys.readouterr() == ("", "") and not console.warnings


def test_a_broken_stdout_is_one_warning_and_later_lines_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", errors)
    console = Console(active=True)
    for number in range(3):
        console.info(f"line {number}")
    assert errors.getvalue() == (
        "warning: stdout cannot be written ([Errno 32] Broken pipe): training goes on without it\n"
    )


def test_a_broken_stderr_is_borne_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(active=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Broken())
        console.warn("a warning")
        console.warn("another")
    console.info("a line")
    assert capsys.readouterr().out == "a line\n"
    assert console.warnings == {"a warning": 1, "another": 1}


def test_streams_that_were_closed_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console = Console(active=True)
    console.info("a line")
    console.warn("a warning")
    console.open_bar(0, 10)
    console.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Bar:
    """In place of tqdm's."""

    def __init__(self, **given: Any) -> None:
        self.n, self.total, self.events = given["initial"], given["total"], list[Any]()

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.events.append(text)

    def update(self, steps: int) -> None:
        self.n += steps
        self.events.append(steps)

    def clear(self) -> None:
        self.events.append("cleared")

    def refresh(self) -> None:
        self.events.append("refreshed")

    def close(self) -> None:
        self.events.append("closed")


def test_the_bar_moves_by_steps_and_lines_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []

    def tqdm(**given: Any) -> Bar:
        bars.append(Bar(**given))
        return bars[-1]

    monkeypatch.setattr("tqdm.tqdm", tqdm)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = Console(active=True)
    console.open_bar(4, 10)
    (bar,) = bars
    assert (bar.n, bar.total) == (4, 10)
    console.move_bar(5, "loss 2")
    console.move_bar(7, "loss 1")
    assert bar.events == ["loss 2", 1, "loss 1", 2] and bar.n == 7
    console.info("a line")
    assert bar.events[4:] == ["cleared", "refreshed"]
    console.close()
    console.close()
    assert bar.events[6:] == ["closed"]


def test_a_terminal_that_vanishes_costs_the_bar_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Bar):
        def update(self, steps: int) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("tqdm.tqdm", Gone)
    monkeypatch.setattr(sys, "stderr", Terminal())
    console = Console(active=True)
    console.open_bar(0, 10)
    console.move_bar(1, "loss")
    console.move_bar(2, "loss")
    console.close()


def test_a_file_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm", lambda **_: pytest.fail("a bar in a file"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Console(active=True).open_bar(0, 10)
