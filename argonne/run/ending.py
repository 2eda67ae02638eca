"""How this process ends: what it tells the other ranks, the status file, the exit code, the one line.

Two threads may end it: the main one (``finish``, ``fail``), or one that watches (``leave``) while the main
one sits in a collective that no peer will answer. Whichever comes first ends it alone.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from argonne.errors import (
    EXIT_FAILURE,
    AuditError,
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    PeerError,
    RunError,
    first_line,
    rank_list,
)
from argonne.run.lock import OutputLock
from argonne.run.peers import Note, Peers
from argonne.run.processes import Launch, kill_children
from argonne.run.signals import SignalInbox, unsaved_line
from argonne.run.stalls import Progress
from argonne.run.status import RunStatus, mark_failed
from argonne.run.traces import dump_stacks

_LOWER_RANK_SECONDS = 3.0
"""How long a rank waits for a lower one to meet the same error before it speaks itself."""
LOSING_SECONDS = 15.0
"""How long a failed collective is not explained by itself where a host may be gone."""
_UNEXPECTED = Note(state="failed", text="an unexpected error, whose traceback is on stderr")


def is_final(error: RunError) -> bool:
    """Whether a restart would only repeat the error.

    Flags, data and checkpoints do not mend themselves, and steps that were not finite come again with the
    same weights and tokens. After an audit a person must choose the checkpoint, and maybe another device.
    """
    return isinstance(error, AuditError | ConfigError | DataError | CheckpointError | NonFiniteError)


class Ending:
    """Ends this process, once.

    ``peers`` is there once the ranks have joined, ``status`` and ``lock`` on rank 0 once it has claimed the
    output folder.
    """

    def __init__(self, output_dir: Path, *, rank: int, launch: Launch, progress: Progress) -> None:
        self.peers: Peers | None = None
        self.status: RunStatus | None = None
        self.lock: OutputLock | None = None
        self.armed = False
        """a thread that watches may still end the process"""
        self._output_dir, self._rank, self._launch, self._progress = output_dir, rank, launch, progress
        self._leaving = threading.Lock()

    def arm(self) -> None:
        """From here on a thread may end the process, and an end without a word is told to the others."""
        os.register_at_fork(after_in_child=self._disarm)
        atexit.register(self._at_exit)
        self.armed = True

    # ---------------------------------------------------------------- on the main thread

    def finish(self, state: str, reason: str | None) -> int:
        """End as ``finished`` (0), ``stopped`` (75, or 0 where torchrun may restart) or ``failed`` (1)."""
        self._end(Note(state=state, text=reason or "", final=True))
        return {"finished": 0, "stopped": self._launch.stop_code}.get(state, EXIT_FAILURE)

    def fail(self, error: RunError | None) -> tuple[int, str | None]:
        """End with an error: the exit code, and the line to print (None: another rank prints it).

        ``error`` is None where no one expected it: its traceback is all that is said.
        """
        if error is None:
            self._end(_UNEXPECTED)
            return EXIT_FAILURE, None
        note = Note(state="failed", text=str(error), final=is_final(error))
        line = None if isinstance(error, _ToldError) else self._line(error, note)
        self._end(note)
        return error.exit_code, line

    def explain(self, error: BaseException) -> RunError:
        """What a failed collective means: the end of a peer, by name where it can be found out."""
        if self.peers is not None:
            began = time.monotonic()
            # Where a host may be gone, the thread that watches ends this process once that is certain.
            while time.monotonic() - began < (LOSING_SECONDS if self.peers.hosts.losing else 3.0):
                self.peers.refresh(0.5)
                if dead := self.peers.dead():
                    return self._death(dead)
                if left := self.left_peer():
                    if left[1].state == "stopped":
                        self._leave_unsaved(left[1])
                    return _ToldError(f"rank {left[0]}: {left[1].text}")
                time.sleep(0.1)
        if isinstance(error, RunError):
            return error
        text = first_line(error)
        return PeerError(
            f"a collective failed in step {self._progress.step} on rank {self._rank} ({text[:200]}): see the "
            f"messages of the other ranks and hosts, then resume"
        )

    def _at_exit(self) -> None:
        """The interpreter ends without ``finish`` or ``fail``."""
        if self.armed:
            self._end(_UNEXPECTED)

    def _disarm(self) -> None:
        self.armed = False

    def _end(self, note: Note) -> None:
        """From here on the main thread ends the process by itself."""
        with self._leaving:
            self.armed = False
        SignalInbox.ignore()
        self._close_books(note)
        if self.peers is not None:
            if note.state == "failed" and self._rank == 0 and self._launch.launcher_pid is None:
                self.peers.wait_for_notes(2.0)  # the store ends with this process
            self.peers.close()

    # ---------------------------------------------------------------- on a thread that watches

    def leave(self, code: int, line: str | None, note: Note) -> NoReturn:
        """End this process now, whatever its main thread is waiting for, and its children with it."""
        with self._leaving:
            if self.armed:
                if line is not None:
                    with contextlib.suppress(OSError):
                        os.write(2, line.encode() + b"\n")
                self._close_books(note)
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError, ValueError, AttributeError):
                        stream.flush()
                kill_children()
                os._exit(code)
        while True:  # the main thread is ending the process already
            time.sleep(60)

    def leave_for(self, error: PeerError) -> NoReturn:
        """End with an error, said by one rank."""
        note = Note(state="failed", text=str(error))
        self.leave(error.exit_code, self._line(error, note), note)

    def leave_unsaved(self, text: str, code: int, line: str | None = None) -> NoReturn:
        """End as stopped before there was anything to save; rank 0 says so where no ``line`` is given."""
        code = self._launch.unsaved_code(code)
        self._leave_unsaved(Note(state="stopped", text=text, final=True, code=code), line)

    def _leave_unsaved(self, note: Note, line: str | None = None) -> NoReturn:
        if line is None and self._rank == 0:
            line = unsaved_line(note.text)
        self.leave(note.code, line, note)

    def follow(self) -> None:
        """End with a peer that died, or that said why it failed."""
        if self.peers is not None and (dead := self.peers.dead()):
            self.leave_for(self._death(dead))
        if (left := self.left_peer()) is not None:
            if left[1].state == "stopped":
                self._leave_unsaved(left[1])
            self.leave(EXIT_FAILURE, None, left[1])

    def left_peer(self) -> tuple[int, Note] | None:
        """A rank that ended while this one would continue: it failed, or stopped before the first step."""
        states = ("failed",) if self._progress.looping else ("failed", "stopped")
        notes = {} if self.peers is None else self.peers.notes()
        return next(((rank, note) for rank, note in notes.items() if note.state in states), None)

    def mark_failed(self, reason: str) -> None:
        """Say in the status of a dead rank 0, which cannot do so any more, that the run failed."""
        mark_failed(self._output_dir, self._launch, reason, self._progress.step)

    def dump_stacks(self) -> None:
        """Write the stacks of this process's threads to ``stats/``."""
        dump_stacks(self._output_dir, self._rank)

    # ---------------------------------------------------------------- both

    def _line(self, error: RunError, note: Note) -> str | None:
        """The line to print, None where another rank prints it; the status of a dead rank 0 says it too."""
        if not self._speaks_for(error, note):
            return None
        if self.status is None:
            self.mark_failed(str(error))
        return f"error: {error}"

    def _speaks_for(self, error: RunError, note: Note) -> bool:
        """Whether this rank prints the error: of those that meet the same one, the lowest does."""
        if self.peers is None or self._rank == 0:
            return True
        if isinstance(error, PeerError):
            return self.peers.is_first_left(self.peers.dead())
        self.peers.say_goodbye(note)
        deadline = time.monotonic() + _LOWER_RANK_SECONDS
        while time.monotonic() < deadline:
            self.peers.refresh(0.5)
            if any(rank < self._rank and other == note for rank, other in self.peers.notes().items()):
                return False
        return True

    def _death(self, dead: list[int]) -> PeerError:
        return PeerError(
            f"{rank_list(dead)} died after step {self._progress.step} ({self._progress.phase}): look for its "
            f"last message above, then resume from the newest checkpoint"
        )

    def _close_books(self, note: Note) -> None:
        if self.peers is not None:
            self.peers.say_goodbye(note)
        if self.status is not None:
            self.status.end(note.state, note.text or None, final=note.final)
        if self.lock is not None:
            self.lock.release()


class _ToldError(PeerError):
    """Another rank has said what is wrong; this one only follows."""
