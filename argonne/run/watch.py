"""The thread that watches the run while the main one trains: signals, allowed time, torchrun, peers.

A signal or the end of the allowed time only raises a flag, so that all ranks save at the same step. Where no
agreement can be reached any more, this thread ends the process.
"""

import os
import signal
import threading
import time
from typing import NoReturn

from argonne.errors import EXIT_FAILURE, PeerError, rank_list
from argonne.run.ending import Ending
from argonne.run.peers import Note, Peers
from argonne.run.processes import Launch
from argonne.run.signals import SignalInbox, too_early
from argonne.run.stalls import Progress, Verdict

BOUNDARY_SECONDS = 10.0
"""How long after a signal a step may take to end (or three times the longest step so far)."""
UNLIMITED_PHASES = frozenset({"save", "export", "validate"})
"""Phases that a first signal lets end, however long they take."""
TROUBLE_SECONDS = 5.0
"""How long the main thread has to meet a peer's end by itself, before this one ends the process."""


class BoundaryClock:
    """How long each phase takes, and when the next boundary is overdue once a signal has arrived."""

    def __init__(self) -> None:
        self.due: float | None = None
        """monotonic seconds; None as long as no signal has arrived"""
        self._longest: dict[str, float] = {}
        self._since = time.monotonic()

    def begin(self) -> None:
        """A phase begins."""
        self._since = time.monotonic()

    def end(self, phase: str) -> None:
        """A phase is over, and the next begins."""
        at = time.monotonic()
        self._longest[phase] = max(self._longest.get(phase, 0.0), at - self._since)
        self._since = at
        if self.due is not None:
            self.due = at + self.patience(phase)

    def expect(self, at: float, phase: str) -> None:
        """A signal arrived in ``phase`` at ``at``; the first one counts."""
        if self.due is None:
            self.due = at + self.patience(phase)

    def patience(self, phase: str) -> float:
        """Seconds that a phase may take after a signal."""
        return max(BOUNDARY_SECONDS, 3 * self._longest.get(phase, 0.0))


class Watcher:
    """Raises the stop flag, and ends the process where the ranks cannot agree on a step any more."""

    def __init__(
        self,
        ending: Ending,
        *,
        rank: int,
        launch: Launch,
        progress: Progress,
        max_run_time: float | None,
        stall_timeout: float,
    ) -> None:
        self.clock = BoundaryClock()
        self.reason: str | None = None
        """why this rank was asked to stop; None: it was not"""
        self._ending, self._rank, self._launch, self._progress = ending, rank, launch, progress
        self._signals = SignalInbox()
        self._stall_timeout, self._max_run_time = stall_timeout, max_run_time
        self._began = time.monotonic()
        self._trouble_since: float | None = None

    @property
    def _peers(self) -> Peers | None:
        return self._ending.peers

    def start(self) -> None:
        """Take the signals and begin to watch; to be called from the main thread, as early as can be."""
        self._signals.open()
        self._ending.arm()
        threading.Thread(target=self._run, name="run control", daemon=True).start()

    def stalled(self, verdict: Verdict, speaks: bool) -> None:
        """End the process because a rank stalled; called from the peers' thread."""
        peers = self._peers
        assert peers is not None
        self._ending.dump_stacks()
        peers.kill(verdict.ranks if verdict.silent else ())
        if speaks and 0 in verdict.ranks:
            self._ending.mark_failed(verdict.text)
        line = f"error: {verdict.text}" if speaks else None
        self._ending.leave(EXIT_FAILURE, line, Note(state="failed", text=verdict.text))

    def _run(self) -> None:
        while True:
            numbers = self._signals.wait(0.5)
            if not self._ending.armed:
                return
            for number in numbers:
                self._take(number)
            self._tick(time.monotonic())

    # ---------------------------------------------------------------- signals

    def _take(self, number: signal.Signals) -> None:
        at = time.monotonic()
        if self._peers is not None:
            # torchrun sends the same signal when a peer has died: then there is nothing to agree on.
            self._peers.refresh(1.0)
            self._ending.follow()
        insists = self._signals.insists(number, at)
        if not self._progress.looping:
            self._leave_before_the_first_step(number)
        if insists:
            text = (
                f"left at once on a second {number.name}, without saving: resume from the newest checkpoint"
            )
            line = f"error: {text}" if self._rank == 0 else None
            self._ending.leave(128 + number, line, Note(state="stopped", text=text, final=True))
        self.clock.expect(at, self._progress.phase)
        self._request(f"{number.name}" if self._rank == 0 else f"{number.name} to rank {self._rank}")

    def _leave_before_the_first_step(self, number: signal.Signals) -> NoReturn:
        text, line = too_early(number), None
        absent = self._peers.absent() if self._peers is not None else []
        if self._peers is not None and absent:  # torchrun sends it, too, when one of them has died
            text += f", before {rank_list(absent)} had joined: look for its last message above"
            line = f"error: left on {text}" if self._peers.is_first_left(absent) else None
        self._ending.leave_unsaved(text, 128 + number, line)

    def _request(self, reason: str) -> None:
        if self.reason is None:
            if self._peers is not None:  # first: once the flag is up, rank 0 may ask for the reason
                self._peers.ask_to_stop(reason)
            self.reason = reason

    # ---------------------------------------------------------------- twice a second

    def _tick(self, at: float) -> None:
        if self._launch.launcher_pid is not None and os.getppid() != self._launch.launcher_pid:
            self._ending.leave_for(
                PeerError("torchrun is gone: start it again to resume from the newest checkpoint")
            )
        if self._max_run_time is not None and at - self._began > self._max_run_time:
            self._end_of_time(f"--max-run-time {self._max_run_time:.0f} s")
        if self._peers is None:
            return
        trouble = bool(self._peers.missing()) or self._ending.left_peer() is not None
        self._trouble_since = (self._trouble_since or at) if trouble else None
        if self._trouble_since is not None and at - self._trouble_since > TROUBLE_SECONDS:
            self._ending.follow()
        if (gone := self._peers.hosts.without_store(self._peers.answered, at)) is not None:
            text, speaks = gone
            note = Note(state="failed", text=text)
            self._ending.leave(EXIT_FAILURE, f"error: {text}" if speaks else None, note)
        if self._stall_timeout > 0 and at - self._peers.answered > max(self._stall_timeout, 30.0):
            self._ending.leave_for(
                PeerError("rank 0's host does not answer any more: check that host, then resume")
            )
        due, phase = self.clock.due, self._progress.phase
        if due is not None and at > due and self._progress.looping and phase not in UNLIMITED_PHASES:
            self._give_up_agreement(self._peers)

    def _end_of_time(self, reason: str) -> None:
        if not self._progress.looping:  # a corpus may be tokenized for hours, which is kept
            text = f"{reason} was over before the first step: give the run more time"
            self._ending.leave_unsaved(text, EXIT_FAILURE, f"error: {text}" if self._rank == 0 else None)
        self._request(reason)

    def _give_up_agreement(self, peers: Peers) -> NoReturn:
        stopped = peers.stopped()
        who = f"{rank_list(stopped)} is stopped" if stopped else "a peer does not answer"
        peers.kill(stopped)
        patience = self.clock.patience(self._progress.phase)
        self._ending.leave_for(
            PeerError(
                f"{who}: no step ended within {patience:.0f} s of {self.reason} after step "
                f"{self._progress.step}, so nothing was saved: resume from the newest checkpoint"
            )
        )
