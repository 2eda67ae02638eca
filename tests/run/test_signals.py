"""Signals: what the first, the same again and a second one do to a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from argonne.run.signals import SignalInbox
from tests import ROOT
from tests.run.pretended import Start, elastic, ended, status_of, wait_for, wait_for_step

NOTHING_SAVED = "nothing was saved, the same command starts again"


@pytest.fixture(autouse=True)
def hangup_as_at_a_terminal(signals_as_they_were: None) -> None:
    """Under nohup SIGHUP is ignored, by the children too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "target"),
    [
        (signal.SIGTERM, "rank 1"),
        (signal.SIGINT, "all"),
        (signal.SIGUSR1, "rank 0"),
        (signal.SIGHUP, "rank 0"),
        *(
            pytest.param(number, target, marks=pytest.mark.slow)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
            for target in ("rank 0", "rank 1", "all")
        ),
    ],
)
def test_a_signal_stops_all_ranks_at_one_step(start: Start, tmp_path: Path, number: int, target: str) -> None:
    ranks = start(2)
    wait_for_step(tmp_path, 3)
    for rank in ranks if target == "all" else [ranks[int(target[-1])]]:
        rank.send_signal(number)
    assert ended(ranks) == [(75, ""), (75, "")]
    status = status_of(tmp_path)
    saved = int((tmp_path / "saved").read_text())
    assert (
        status["state"] == "stopped" and status["step"] == saved and status["checkpoint"] == f"step_{saved}"
    )
    assert signal.Signals(number).name in status["reason"]
    assert status["host"] and status["pid"] == ranks[0].pid and status["heartbeat"]


def test_a_second_interrupt_leaves_at_once_even_in_a_save(start: Start, tmp_path: Path) -> None:
    ranks = start(2, save_seconds=1000)
    wait_for_step(tmp_path, 3)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert all(rank.poll() is None for rank in ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)  # what torchrun sends at a second Ctrl-C
    outcomes = ended(ranks)
    assert [code for code, _ in outcomes] == [128 + signal.SIGTERM] * 2
    assert "".join(errors for _, errors in outcomes).count("error: ") == 1
    assert not (tmp_path / "saved").exists()
    assert status_of(tmp_path)["state"] == "stopped"


def test_the_same_signal_twice_at_once_is_one_request(start: Start, tmp_path: Path) -> None:
    ranks = start(2, save_seconds=1.0)
    wait_for_step(tmp_path, 3)
    for _ in range(2):
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert ended(ranks) == [(75, ""), (75, "")]
    assert (tmp_path / "saved").exists()


def test_the_same_signal_again_after_a_while_leaves_at_once(start: Start, tmp_path: Path) -> None:
    ranks = start(2, save_seconds=1000)
    wait_for_step(tmp_path, 3)
    for _ in range(2):
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        time.sleep(2.5)
    outcomes = ended(ranks)
    assert [code for code, _ in outcomes] == [128 + signal.SIGTERM] * 2
    assert "".join(errors for _, errors in outcomes).count("error: left at once on a second SIGTERM") == 1
    assert not (tmp_path / "saved").exists() and status_of(tmp_path)["state"] == "stopped"


def test_a_signal_before_the_first_step_ends_at_once(start: Start, tmp_path: Path) -> None:
    ranks = start(2, start_seconds=1000)
    wait_for(lambda: (tmp_path / "store_0" / "starting_1").exists())
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    line = f"stopped by SIGTERM before the first step: {NOTHING_SAVED}\n"
    assert ended(ranks) == [(128 + signal.SIGTERM, line), (128 + signal.SIGTERM, "")]
    assert status_of(tmp_path)["state"] == "stopped"


def test_a_rank_stopped_before_the_first_step_takes_the_others_along(start: Start, tmp_path: Path) -> None:
    ranks = start(2, environ=elastic(most=1), start_seconds=1000)
    wait_for(lambda: (tmp_path / "store_0" / "starting_1").exists())
    ranks[1].send_signal(signal.SIGTERM)
    line = f"stopped by SIGTERM before the first step: {NOTHING_SAVED}\n"
    assert ended(ranks) == [(0, line), (0, "")]  # no failure, which torchrun would answer by a restart
    assert status_of(tmp_path)["state"] == "stopped" and status_of(tmp_path)["final"]


@pytest.mark.usefixtures("own_signals")
def test_ignored_signals_of_the_parent(start: Start, tmp_path: Path) -> None:
    """A scheduler's SIGTERM counts even so; a lost terminal under nohup does not."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    (run,) = start(1, steps=5000)
    wait_for_step(tmp_path, 3)
    run.send_signal(signal.SIGHUP)
    wait_for_step(tmp_path, 30)
    run.send_signal(signal.SIGTERM)
    assert ended([run]) == [(75, "")]


@pytest.mark.parametrize(
    ("first", "second", "seconds", "insists"),
    [
        (signal.SIGINT, signal.SIGINT, 0.1, False),  # the terminal's and torchrun's: one Ctrl-C
        (signal.SIGINT, signal.SIGINT, 1.0, True),
        (signal.SIGINT, signal.SIGTERM, 0.1, True),  # a second Ctrl-C, as torchrun passes it on
        (signal.SIGTERM, signal.SIGTERM, 1.0, False),
        (signal.SIGTERM, signal.SIGTERM, 3.0, True),
        (signal.SIGUSR1, signal.SIGTERM, 60.0, False),  # the scheduler's warning, then its end
        (signal.SIGTERM, signal.SIGINT, 60.0, False),
    ],
)
def test_what_a_second_signal_means(first: int, second: int, seconds: float, insists: bool) -> None:
    inbox = SignalInbox()
    assert not inbox.insists(first, 100.0)
    assert inbox.insists(second, 100.0 + seconds) == insists


@pytest.mark.usefixtures("own_signals")
def test_the_inbox_gets_stop_signals_only() -> None:
    inbox = SignalInbox()
    before = signal.set_wakeup_fd(-1)
    usual = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    try:
        inbox.open()
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        received = inbox.wait(5.0)
        while len(received) < 2:
            received += inbox.wait(5.0)
        assert received == [signal.SIGUSR1, signal.SIGTERM]
        assert inbox.wait(0.0) == []
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR2, usual)


EARLY = """
import os, signal, sys
from argonne.run.signals import leave_on_signals
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[2:] else signal.SIG_DFL)
leave_on_signals()
os.kill(os.getpid(), int(sys.argv[1]))
import json
print("still here")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("rank", ["", "0", "1"])
def test_a_signal_during_the_imports_is_one_line_of_rank_0(number: signal.Signals, rank: str) -> None:
    environ = {**os.environ, "RANK": rank}
    done = subprocess.run(
        [sys.executable, "-c", EARLY, str(int(number))], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    line = (
        f"stopped by {number.name} before the first step: nothing was saved, the same command starts again\n"
    )
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == ("" if rank == "1" else line)


def test_an_interrupt_that_the_parent_ignores_is_ignored() -> None:
    command = [sys.executable, "-c", EARLY, str(int(signal.SIGINT)), "deaf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")
