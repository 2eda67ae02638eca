"""Signals that stop a run: how they are received, and whether one insists on an earlier one."""

import contextlib
import os
import select
import signal
import socket

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_SIGNAL_SECONDS = 2.0
"""A signal of the same kind within this time is the same request: Slurm and torchrun both send it."""
SAME_INTERRUPT_SECONDS = 0.3
"""The same for SIGINT, which a person repeats faster."""


def unsaved_line(text: str) -> str:
    """The line of a run that a signal ends before its first step; ``text`` of :func:`too_early`."""
    return f"stopped by {text}: nothing was saved, the same command starts again"


def too_early(number: int) -> str:
    """What ended a run that had nothing to save yet."""
    return f"{signal.Signals(number).name} before the first step"


def leave_on_signals() -> None:
    """Until an inbox is opened, a stop signal ends the process at once, in one line from rank 0.

    To be called from the main thread before anything large is imported: a KeyboardInterrupt would come out
    of the middle of an import.
    """
    for number in STOP_SIGNALS:
        if not _deaf(number):
            signal.signal(number, _leave)


def _leave(number: int, frame: object) -> None:
    if os.environ.get("RANK", "").strip() in ("", "0"):
        with contextlib.suppress(OSError):
            os.write(2, unsaved_line(too_early(number)).encode() + b"\n")
    os._exit(128 + number)


def _deaf(number: int) -> bool:
    """nohup, or a shell's background: a lost terminal or a Ctrl-C for another is no reason to stop."""
    return number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN


class SignalInbox:
    """Receives the stop signals for a watching thread.

    A Python handler runs on the main thread, which may sit in a collective for minutes. The wake-up socket is
    written the moment the signal arrives, and any thread can read it.
    """

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._latest: tuple[int, float] | None = None

    def open(self) -> None:
        """Receive the signals from now on; to be called from the main thread."""
        self._read.setblocking(False)
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if not _deaf(number):
                signal.signal(number, lambda number, frame: None)
        # A forked child would send its own signals down our wake-up socket: give it the ordinary ones back.
        os.register_at_fork(after_in_child=self._in_child)

    def wait(self, seconds: float) -> list[signal.Signals]:
        """The stop signals that have arrived; waits for one, ``seconds`` at most."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        numbers = self._read.recv(64) if ready else b""
        return [signal.Signals(number) for number in numbers if number in STOP_SIGNALS]

    def insists(self, number: int, at: float) -> bool:
        """Whether a signal that arrived at ``at`` (monotonic seconds) asks to leave without saving.

        A second Ctrl-C does (torchrun passes it on as SIGTERM), or the same signal again after a while.
        """
        before, self._latest = self._latest, (number, at)
        if before is None:
            return False
        first, when = before
        if first == signal.SIGINT:
            return number == signal.SIGTERM or at - when > SAME_INTERRUPT_SECONDS
        return number == first and at - when > SAME_SIGNAL_SECONDS

    @staticmethod
    def ignore() -> None:
        """Signals change nothing any more: the main thread is ending the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @staticmethod
    def _in_child() -> None:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
