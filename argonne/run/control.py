"""How a run ends: by a signal, by its time, by a dead or stalled peer, by an error, or because it is done.

Signals only set a flag, which the loop hands to the other ranks in its per-step all-reduce; all save at the
same step. A watcher thread takes the signal even while the main thread sits in a collective, and leaves the
process where no agreement can come any more. Nothing here knows torch.
"""

import atexit
import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import NoReturn

from argonne.errors import EXIT_FAILURE, PeerError, RunError, first_line
from argonne.files import OutputFolder
from argonne.run.lock import OutputLock
from argonne.run.peers import KeyStore, Note, Peers
from argonne.run.processes import Launch, kill_children
from argonne.run.stalls import Progress, Verdict, rank_list
from argonne.run.status import HEARTBEAT_SECONDS, RunStatus, earlier_attempt, is_final, mark_failed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
BOUNDARY_SECONDS = 10.0
"""How long after a signal a step may take to end (or three times the longest step so far)."""
SAME_SIGNAL_SECONDS = 2.0
"""A signal of the same kind within this time is the same request: Slurm and torchrun both send it."""
UNLIMITED_PHASES = frozenset({"save", "export"})
"""Phases that a first signal lets end, however long they take."""
TROUBLE_SECONDS = 5.0
"""How long the main thread has to meet a peer's end by itself, before the watcher ends the process."""


def enable_flight_recorder(output_dir: Path, environ: MutableMapping[str, str]) -> None:
    """Ask PyTorch to keep its last collectives and write them to ``stats/`` when one times out.

    To be called before the process groups are made; what the user has set stays.
    """
    environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(OutputFolder(output_dir).flight_recorder_prefix))


class RunControl:
    """Everything that may end this process, in one place.

    Order of use: ``start`` (main thread, early), ``claim`` (rank 0: folder, lock, status), ``join`` (once the
    store exists), ``begin``, then per step the ``stop_flag`` and ``boundary``, at the end ``finish`` or
    ``fail``.

    Args:
        output_dir: folder of ``stats/``.
        rank, world_size: this process among all.
        max_run_time: seconds after which the run stops and saves; None: no limit.
        stall_timeout: seconds without progress after which a stalled rank ends the run; 0: never.
        warn: takes warnings (``RunReport.warn``).
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        rank: int,
        world_size: int,
        launch: Launch,
        max_run_time: float | None = None,
        stall_timeout: float = 600.0,
        warn: Callable[[str], None],
    ) -> None:
        self.output_dir, self.rank, self.world_size, self.launch = output_dir, rank, world_size, launch
        self.progress = Progress()
        self.status: RunStatus | None = None
        self.peers: Peers | None = None
        self.written_before: Path | None = None
        """on rank 0 after ``claim``: the newest checkpoint of an earlier attempt of this launch"""
        self._lock: OutputLock | None = None
        self._warn = warn
        self._stall_timeout = stall_timeout
        self._began = time.monotonic()
        self._max_run_time = max_run_time
        self._reason: str | None = None
        self._signal: tuple[int, float] | None = None
        self._boundary_due: float | None = None
        self._longest: dict[str, float] = {}
        self._phase_since = time.monotonic()
        self._trouble_since: float | None = None
        self._leaving = threading.Lock()
        self._armed = False
        self._looping = False
        self._wake_read, self._wake_write = socket.socketpair()

    # ---------------------------------------------------------------- set-up

    def start(self) -> None:
        """Take the signals; to be called from the main thread, as early as can be."""
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # nohup, or a shell's background: a lost terminal or a Ctrl-C for another is no reason to stop.
            deaf = number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN
            if not deaf:
                signal.signal(number, lambda number, frame: None)
        # A forked child would send its own signals down our wake-up socket: give it the ordinary ones back.
        os.register_at_fork(after_in_child=self._in_child)
        atexit.register(self._at_exit)
        self._armed = True
        threading.Thread(target=self._watch, name="run control", daemon=True).start()

    def claim(self) -> None:
        """On rank 0, after ``prepare_output_dir``: lock the folder and start its status file.

        Raises:
            RunError: another run uses the folder.
        """
        lock = OutputLock(self.output_dir, self.launch)
        lock.acquire()
        self._lock = lock
        before = earlier_attempt(self.output_dir, self.launch) or {}
        self.written_before = Path(before["checkpoint"]) if before.get("checkpoint") else None
        self.status = RunStatus(self.output_dir, self.launch, self._warn, world_size=self.world_size)
        self.status.update(checkpoint=before.get("checkpoint"))
        threading.Thread(target=self._heartbeat, name="run status", daemon=True).start()

    def join(self, store: KeyStore) -> None:
        """Look after the other ranks from now on; ``store`` is used by another thread (give it a clone)."""
        if self.world_size > 1:
            self.peers = Peers(
                store,
                self.rank,
                self.world_size,
                self.progress,
                attempt=self.launch.restart_count,
                stall_timeout=self._stall_timeout,
                on_verdict=self._stalled,
            )

    def all_came(self) -> None:
        """Every rank has joined: learn where each runs, before the store can go with its process."""
        if self.peers is not None:
            self.peers.refresh()

    # ---------------------------------------------------------------- the loop

    @property
    def stop_flag(self) -> int:
        """1 where this rank was asked to stop; the loop sums it over the ranks in its per-step all-reduce."""
        return int(self._reason is not None)

    def begin(self, step: int) -> None:
        """The loop starts after ``step`` completed steps. Before, a signal ends the process at once."""
        self.progress.mark("step", step)
        self._phase_since = time.monotonic()
        self._looping = True
        if self.status is not None:
            self.status.update(step=step)

    def boundary(self, step: int) -> None:
        """A step is complete, ``step`` in all, and the ranks have agreed on going on or stopping."""
        self._end_phase("step")
        self.progress.mark("step", step)
        if self.status is not None:
            self.status.note_step(step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something else than a step: ``save``, ``sample``, ``load``, ``export``, ``verify``, ``compile``."""
        before = self.progress.phase
        self._phase_since = time.monotonic()
        self.progress.mark(name)
        yield
        # After an error the phase stands, and is named with it.
        self._end_phase(name)
        self.progress.mark(before)

    def stop_reason(self) -> str:
        """Why the run stops, once the ranks have agreed to."""
        told = self.peers.stop_reason() if self.peers is not None else None
        return self._reason or told or "a signal to another rank"

    def grace_warning(self, save_seconds: float) -> str | None:
        """What to warn of at the start where a save takes longer than torchrun waits after a signal."""
        grace = self.launch.grace_seconds(os.environ)
        if grace is None or save_seconds < 0.8 * grace:
            return None
        return (
            f"a save takes about {save_seconds:.0f} s, but torchrun kills its workers {grace:.0f} s after a "
            f"signal: start it with --shutdown-timeout {max(600, 3 * round(save_seconds))}"
        )

    # ---------------------------------------------------------------- the end

    def finish(self, state: str, reason: str | None = None) -> int:
        """The run is done (``finished``) or has stopped and saved (``stopped``): the exit code.

        ``failed`` is for a restart that an earlier attempt has made pointless. To be called on every rank
        after a barrier; signals change nothing any more.
        """
        self._end(Note(state=state, text=reason or "", final=True))
        return {"finished": 0, "stopped": self.launch.stop_code}.get(state, EXIT_FAILURE)

    def fail(self, error: RunError) -> tuple[int, str | None]:
        """The run ends with an error: the exit code, and the line to print (None: another rank prints it)."""
        note = Note(state="failed", text=str(error), final=is_final(error))
        speaks = not isinstance(error, _ToldError) and self._speaks_for(error, note)
        if speaks and self.status is None:
            mark_failed(self.output_dir, self.launch, str(error), self.progress.step)
        self._end(note)
        return error.exit_code, f"error: {error}" if speaks else None

    def explain(self, error: BaseException) -> RunError:
        """What a failed collective means: the end of a peer, by name where it can be found out."""
        if self.peers is not None:
            deadline = time.monotonic() + 3.0
            while time.monotonic() < deadline:
                self.peers.refresh(0.5)
                if dead := self.peers.dead():
                    return self._death(dead)
                if left := self._left_peer():
                    if left[1].state == "stopped":
                        self._leave(self.launch.stop_code, None, left[1])
                    return _ToldError(f"rank {left[0]}: {left[1].text}")
                time.sleep(0.1)
        if isinstance(error, RunError):
            return error
        text = first_line(error)
        return PeerError(
            f"a collective failed in step {self.progress.step} on rank {self.rank} ({text[:200]}): see the "
            f"messages of the other ranks and hosts, then resume"
        )

    # ---------------------------------------------------------------- inside

    def _at_exit(self) -> None:
        """The interpreter ends without ``finish`` or ``fail``: after an error that no one expected."""
        if self._armed:
            self._end(Note(state="failed", text="an unexpected error, whose traceback is on stderr"))

    def _in_child(self) -> None:
        self._armed = False
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)

    def _speaks_for(self, error: RunError, note: Note) -> bool:
        """Whether this rank prints the error: of those that meet the same one, the lowest does."""
        if self.peers is None or self.rank == 0:
            return True
        if isinstance(error, PeerError):
            return self.peers.is_first_left(self.peers.dead())
        self.peers.say_goodbye(note)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            self.peers.refresh(0.5)
            if any(rank < self.rank and other == note for rank, other in self.peers.notes().items()):
                return False
        return True

    def _left_peer(self) -> tuple[int, Note] | None:
        """A rank that ended while this one would go on: it failed, or was stopped before the first step."""
        states = ("failed",) if self._looping else ("failed", "stopped")
        notes = {} if self.peers is None else self.peers.notes()
        return next(((rank, note) for rank, note in notes.items() if note.state in states), None)

    def _end(self, note: Note) -> None:
        """From here on the main thread ends the process by itself."""
        with self._leaving:
            self._armed = False
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._close_books(note)
        if self.peers is not None:
            if note.state == "failed" and self.rank == 0 and self.launch.launcher_pid is None:
                self.peers.wait_for_notes(2.0)  # the store ends with this process
            self.peers.close()

    def _close_books(self, note: Note) -> None:
        if self.peers is not None:
            self.peers.say_goodbye(note)
        if self.status is not None:
            self.status.end(note.state, note.text or None, final=note.final)
        if self._lock is not None:
            self._lock.release()

    def _end_phase(self, name: str) -> None:
        at = time.monotonic()
        self._longest[name] = max(self._longest.get(name, 0.0), at - self._phase_since)
        self._phase_since = at
        if self._boundary_due is not None:
            self._boundary_due = at + self._patience()

    def _patience(self) -> float:
        return max(BOUNDARY_SECONDS, 3 * self._longest.get(self.progress.phase, 0.0))

    def _heartbeat(self) -> None:
        while self.status is not None and self._armed:
            self.status.heartbeat()
            if self._lock is not None:
                self._lock.heartbeat()
            time.sleep(HEARTBEAT_SECONDS)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._wake_read], [], [], 0.5)
            numbers = self._wake_read.recv(64) if ready else b""
            if not self._armed:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._take(signal.Signals(number))
            self._tick(time.monotonic())

    def _take(self, number: signal.Signals) -> None:
        at = time.monotonic()
        if self.peers is not None:
            # torchrun sends the same signal when a peer has died: then there is nothing to agree on.
            self.peers.refresh(1.0)
            self._follow()
        before, self._signal = self._signal, (number, at)
        if not self._looping:
            self._take_before_the_first_step(number)
        if before is not None and self._is_impatient(before, number, at):
            text = (
                f"left at once on a second {number.name}, without saving: resume from the newest checkpoint"
            )
            line = f"error: {text}" if self.rank == 0 else None
            self._leave(128 + number, line, Note(state="stopped", text=text, final=True))
        if self._boundary_due is None:
            self._boundary_due = at + self._patience()
        self._request(f"{number.name}" if self.rank == 0 else f"{number.name} to rank {self.rank}")

    def _leave_before_the_first_step(self, text: str, line: str | None) -> NoReturn:
        self._leave(self.launch.stop_code, line, Note(state="stopped", text=text, final=True))

    def _take_before_the_first_step(self, number: signal.Signals) -> NoReturn:
        text, line = f"{number.name} before the first step", None
        absent = self.peers.absent() if self.peers is not None else []
        if self.peers is not None and absent:  # torchrun sends it, too, when one of them has died
            text += f", while {rank_list(absent)} had not come: look for its last message above"
            line = f"error: left on {text}" if self.peers.is_first_left(absent) else None
        self._leave_before_the_first_step(text, line)

    @staticmethod
    def _is_impatient(before: tuple[int, float], number: int, at: float) -> bool:
        """A second Ctrl-C (a SIGTERM, when torchrun passes it on), or the same signal again after a while."""
        first, when = before
        if first == signal.SIGINT:
            return number == signal.SIGTERM or at - when > 0.3
        return number == first and at - when > SAME_SIGNAL_SECONDS

    def _request(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            if self.peers is not None:
                self.peers.ask_to_stop(reason)

    def _tick(self, at: float) -> None:
        if self.launch.launcher_pid is not None and os.getppid() != self.launch.launcher_pid:
            self._leave_for(
                PeerError("torchrun is gone: start it again to resume from the newest checkpoint")
            )
        if self._max_run_time is not None and at - self._began > self._max_run_time:
            reason = f"--max-run-time {self._max_run_time:.0f} s"
            if not self._looping:  # a corpus may be tokenized for hours, which is kept
                text = f"{reason} was over before the first step: give the run more time"
                self._leave_before_the_first_step(text, f"error: {text}" if self.rank == 0 else None)
            self._request(reason)
        if self.peers is None:
            return
        trouble = bool(self.peers.missing()) or self._left_peer() is not None
        self._trouble_since = (self._trouble_since or at) if trouble else None
        if self._trouble_since is not None and at - self._trouble_since > TROUBLE_SECONDS:
            self._follow()
        if self._stall_timeout > 0 and at - self.peers.answered > max(self._stall_timeout, 30.0):
            self._leave_for(PeerError("rank 0's host does not answer any more: look at it, then resume"))
        due = self._boundary_due
        if due is not None and at > due and self._looping and self.progress.phase not in UNLIMITED_PHASES:
            self._give_up_agreement()

    def _give_up_agreement(self) -> NoReturn:
        assert self.peers is not None
        stopped = self.peers.stopped()
        who = f"{rank_list(stopped)} is stopped" if stopped else "a peer does not answer"
        self.peers.kill(stopped)
        self._leave_for(
            PeerError(
                f"{who}: no step ended within {self._patience():.0f} s of {self._reason} after step "
                f"{self.progress.step}, so nothing was saved: resume from the newest checkpoint"
            )
        )

    def _follow(self) -> None:
        """End with a peer that died, or that said why it failed."""
        if self.peers is not None and (dead := self.peers.dead()):
            self._leave_for(self._death(dead))
        if (left := self._left_peer()) is not None:
            stopped = left[1].state == "stopped"
            self._leave(self.launch.stop_code if stopped else EXIT_FAILURE, None, left[1])

    def _death(self, dead: list[int]) -> PeerError:
        return PeerError(
            f"{rank_list(dead)} died after step {self.progress.step} ({self.progress.phase}): look for its "
            f"last message above, then resume from the newest checkpoint"
        )

    def _stalled(self, verdict: Verdict, speaks: bool) -> None:
        assert self.peers is not None
        self._dump_stacks()
        self.peers.kill(verdict.ranks if verdict.silent else ())
        if speaks and 0 in verdict.ranks:
            mark_failed(self.output_dir, self.launch, verdict.text, self.progress.step)
        line = f"error: {verdict.text}" if speaks else None
        self._leave(EXIT_FAILURE, line, Note(state="failed", text=verdict.text))

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError):
            with OutputFolder(self.output_dir).stack(self.rank).open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)

    def _leave_for(self, error: PeerError) -> NoReturn:
        note = Note(state="failed", text=str(error))
        speaks = self._speaks_for(error, note)
        if speaks and self.status is None:
            mark_failed(self.output_dir, self.launch, str(error), self.progress.step)
        self._leave(error.exit_code, f"error: {error}" if speaks else None, note)

    def _leave(self, code: int, line: str | None, note: Note) -> NoReturn:
        """End this process now, whatever its main thread is waiting for, and its children with it."""
        with self._leaving:
            if self._armed:
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


class _ToldError(PeerError):
    """Another rank has said what is wrong; this one only follows."""
