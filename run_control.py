"""How a run ends: by a signal, by its time, by a dead or stalled peer, by an error, or because it is done.

Signals only set a flag, which the loop hands to the other ranks in its per-step all-reduce; all save at the
same step. A watcher thread takes the signal even while the main thread sits in a collective, and leaves the
process where no agreement can come any more. Nothing here knows torch.
"""

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

from run_errors import EXIT_FAILURE, PeerError, RunError
from run_peers import KeyStore, Peers, Progress, Verdict, rank_list
from run_status import HEARTBEAT_SECONDS, Launch, OutputLock, RunStatus, is_final, mark_failed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BOUNDARY_SECONDS = 10.0
"""How long after a signal a step may take to end (or three times the longest step so far)."""
SAME_SIGNAL_SECONDS = 2.0
"""A signal of the same kind within this time is the same request: Slurm and torchrun both send it."""
UNLIMITED_PHASES = frozenset({"save", "export"})
"""Phases that a first signal lets end, however long they take."""
DEAD_PEER_SECONDS = 5.0
"""How long the main thread has to meet a peer's death by itself, before the watcher ends the process."""


def enable_flight_recorder(folder: Path, environ: MutableMapping[str, str]) -> None:
    """Ask PyTorch to keep its last collectives and write them to ``folder`` when one times out.

    To be called before the process groups are made; what the user has set stays.
    """
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # now, and before torch 2.9
        environ.setdefault(name, "2000")
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        environ.setdefault(name, str(folder / "flight_recorder_rank_"))


def grace_seconds(launch: Launch, environ: MutableMapping[str, str]) -> float | None:
    """How long torchrun waits after a signal before it kills its workers; None without torchrun."""
    if launch.launcher_pid is None:
        return None
    try:
        words = Path(f"/proc/{launch.launcher_pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = []
    for index, word in enumerate(words):
        name, _, value = word.replace("_", "-").partition("=")
        if name == "--shutdown-timeout":
            return float(value or words[index + 1])
    return float(environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


class RunControl:
    """Everything that may end this process, in one place.

    Order of use: ``start`` (main thread, early), ``claim`` (rank 0: folder, lock, status), ``join`` (once the
    store exists), then per step ``boundary`` and the ``stop_flag``, at the end ``finish`` or ``fail``.

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
        self._dead_since: float | None = None
        self._leaving = threading.Lock()
        self._armed = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._previous: dict[int, object] = {}

    # ---------------------------------------------------------------- set-up

    def start(self) -> None:
        """Take the signals; to be called from the main thread, as early as can be."""
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, lambda number, frame: None)
        # A forked child would send its own signals down our wake-up socket: give it the ordinary ones back.
        os.register_at_fork(after_in_child=self._in_child)
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
        self.status = RunStatus(self.output_dir, self.launch, self._warn, world_size=self.world_size)
        self.status.heartbeat()
        threading.Thread(target=self._heartbeat, name="run status", daemon=True).start()

    def join(self, store: KeyStore) -> None:
        """Look after the other ranks from now on; ``store`` is used by another thread (give it a clone)."""
        if self.world_size > 1:
            self.peers = Peers(
                store,
                self.rank,
                self.world_size,
                self.progress,
                stall_timeout=self._stall_timeout,
                on_verdict=self._stalled,
            )

    # ---------------------------------------------------------------- the loop

    @property
    def stop_flag(self) -> int:
        """1 where this rank was asked to stop; the loop sums it over the ranks in its per-step all-reduce."""
        return int(self._reason is not None)

    def boundary(self, step: int) -> None:
        """A step is complete: ``step`` optimizer steps so far, and the ranks have agreed on stop or go on."""
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
        try:
            yield
        finally:
            self._end_phase(name)
            self.progress.mark(before)

    def stop_reason(self) -> str:
        """Why the run stops, as far as this rank knows; after the ranks agreed."""
        if self._reason is not None:
            return self._reason
        if self.peers is not None:
            self.peers.refresh()
            for rank in range(self.world_size):
                note = self.peers.note(rank)
                if note is not None:
                    return note.removeprefix("stopping: ")
        return "a signal to another rank"

    # ---------------------------------------------------------------- the end

    def finish(self, state: str, reason: str | None = None) -> int:
        """The run is done (``finished``) or has stopped and saved (``stopped``): the exit code.

        To be called on every rank after a barrier; signals change nothing any more.
        """
        self._disarm(f"{state}: {reason}" if reason else state)
        if self.status is not None:
            self.status.end(state, reason)
        if self._lock is not None:
            self._lock.release()
        return self.launch.stop_code if state == "stopped" else 0

    def fail(self, error: RunError) -> tuple[int, str | None]:
        """The run ends with an error: the exit code, and the line to print (None: another rank says it)."""
        line: str | None = f"error: {error}"
        if self.peers is not None and not isinstance(error, PeerError):
            self.peers.refresh(1.0)
            if any(self.peers.note(rank) == line for rank in range(self.rank)):
                line = None
        self._disarm(line or "failed")
        self._record_failure(str(error), final=is_final(error))
        return error.exit_code, line

    def explain(self, error: BaseException) -> RunError:
        """What a failed collective means: the death of a peer, by name where it can be found out."""
        if self.peers is None:
            return PeerError(f"{type(error).__name__}: {error}")
        deadline = time.monotonic() + 3.0
        while not (dead := self.peers.dead()) and time.monotonic() < deadline:
            self.peers.refresh(0.5)
            left = [rank for rank in range(self.world_size) if self.peers.note(rank) and rank != self.rank]
            if left:
                return _Told(f"rank {left[0]}: {self.peers.note(left[0])}")
            time.sleep(0.1)
        if dead:
            return self._death(dead)
        text = str(error).splitlines()[0] if str(error) else ""
        return PeerError(
            f"a collective failed in step {self.progress.step} on rank {self.rank}: {text[:200]}: see the "
            f"other ranks' and hosts' messages, then resume"
        )

    def speaks(self, error: RunError) -> bool:
        """Whether this rank is the one to print an error that all survivors meet."""
        if isinstance(error, _Told):
            return False
        if self.peers is None or not isinstance(error, PeerError):
            return True
        return self.rank == self.peers.first_left(self.peers.dead())

    # ---------------------------------------------------------------- inside

    def _in_child(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)

    def _disarm(self, note: str) -> None:
        self._armed = False
        for number in STOP_SIGNALS:
            with contextlib.suppress(ValueError):  # not in the main thread: the handlers do nothing anyway
                signal.signal(number, signal.SIG_IGN)
        if self.peers is not None:
            self.peers.say_goodbye(note)
            self.peers.close()

    def _record_failure(self, reason: str, *, final: bool) -> None:
        if self.status is not None:
            self.status.end("failed", reason, final=final)
        if self._lock is not None:
            self._lock.release()

    def _end_phase(self, name: str) -> None:
        at = time.monotonic()
        self._longest[name] = max(self._longest.get(name, 0.0), at - self._phase_since)
        self._phase_since = at
        if self._boundary_due is not None:
            self._boundary_due = at + self._patience()

    def _patience(self) -> float:
        return max(BOUNDARY_SECONDS, 3 * max(self._longest.values(), default=0.0))

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
            self.peers.refresh(1.0)
            if dead := self.peers.dead():
                self._leave_for(self._death(dead))
        if self.progress.phase == "start":
            if self.status is not None:
                self.status.end("stopped", f"{number.name} before the first step", final=False)
            self._leave(75, None, f"stopped: {number.name} before the first step")
        before, self._signal = self._signal, (number, at)
        if before is not None and self._is_impatient(before, number, at):
            if self.status is not None:
                self.status.end("stopped", f"second {number.name}: left at once, without saving")
            line = f"error: left at once on a second {number.name}, without saving: resume from the newest checkpoint"
            self._leave(128 + number, line if self.rank == 0 else None, f"stopped by a second {number.name}")
        self._request(f"{number.name}" if self.rank == 0 else f"{number.name} to rank {self.rank}")

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
            self._boundary_due = time.monotonic() + self._patience()
            if self.peers is not None and self.rank != 0:
                self.peers.say_goodbye(f"stopping: {reason}")

    def _tick(self, at: float) -> None:
        if self.launch.launcher_pid is not None and os.getppid() != self.launch.launcher_pid:
            self._leave_for(
                PeerError("torchrun is gone: start it again to resume from the newest checkpoint")
            )
        if self._max_run_time is not None and at - self._began > self._max_run_time:
            self._request(f"--max-run-time {self._max_run_time:.0f} s")
        if self.peers is None:
            return
        dead = self.peers.dead()
        self._dead_since = (self._dead_since or at) if dead else None
        if self._dead_since is not None and at - self._dead_since > DEAD_PEER_SECONDS:
            self._leave_for(self._death(dead))
        due = self._boundary_due
        if due is not None and at > due and self.progress.phase not in UNLIMITED_PHASES:
            stopped = self.peers.stopped()
            who = f"{rank_list(stopped)} is stopped" if stopped else "a peer does not answer"
            self.peers.kill(stopped)
            self._leave_for(
                PeerError(
                    f"{who}: no step ended within {at - due + self._patience():.0f} s of {self._reason} in step "
                    f"{self.progress.step}, so nothing was saved: resume from the newest checkpoint"
                )
            )

    def _death(self, dead: list[int]) -> PeerError:
        return PeerError(
            f"{rank_list(dead)} died in or after step {self.progress.step} ({self.progress.phase}): look for its "
            f"last message above, then resume from the newest checkpoint"
        )

    def _stalled(self, verdict: Verdict, speaks: bool) -> None:
        assert self.peers is not None
        self._dump_stacks()
        self.peers.kill(verdict.ranks if verdict.silent else ())
        line = f"error: {verdict.text}" if speaks else None
        if speaks and 0 in verdict.ranks:
            mark_failed(self.output_dir, verdict.text)
        if self.status is not None:
            self.status.end("failed", verdict.text, final=False)
        self._leave(EXIT_FAILURE, line, "ended by a stalled rank")

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError):
            with (self.output_dir / "stats" / f"stack_rank_{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)

    def _leave_for(self, error: PeerError) -> NoReturn:
        if self.status is not None:
            self.status.end("failed", str(error), final=False)
        elif self.speaks(error):
            mark_failed(self.output_dir, str(error))
        self._leave(error.exit_code, f"error: {error}" if self.speaks(error) else None, f"ended: {error}")

    def _leave(self, code: int, line: str | None, note: str) -> NoReturn:
        """End this process now, whatever its main thread is waiting for, and its children with it."""
        with self._leaving:
            if line is not None:
                with contextlib.suppress(OSError):
                    os.write(2, line.encode() + b"\n")
            if self.peers is not None and not note.startswith("ended"):
                self.peers.say_goodbye(note)
            if self._lock is not None:
                self._lock.release()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            _kill_children()
            os._exit(code)


class _Told(PeerError):
    """Another rank has said what is wrong; this one only follows."""


def _kill_children() -> None:
    """Data processes would outlive an ``os._exit``."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(pid), signal.SIGKILL)
