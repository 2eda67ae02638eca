"""The run as its loop sees it: set-up, phases, step boundaries, the flag that asks to stop, the end.

Nothing here knows torch.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from argonne.errors import RunError
from argonne.run.ending import Ending
from argonne.run.lock import HEARTBEAT_SECONDS, OutputLock
from argonne.run.peers import KeyStore, Peers
from argonne.run.processes import Launch
from argonne.run.stalls import Progress
from argonne.run.status import RunStatus, earlier_attempt
from argonne.run.watch import Watcher


class RunControl:
    """What the training loop and its set-up tell about the run, and what they ask.

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
        self.written_before: Path | None = None
        """on rank 0 after ``claim``: the newest checkpoint of an earlier attempt of this launch"""
        self._ending = Ending(output_dir, rank=rank, launch=launch, progress=self.progress)
        self._watcher = Watcher(
            self._ending,
            rank=rank,
            launch=launch,
            progress=self.progress,
            max_run_time=max_run_time,
            stall_timeout=stall_timeout,
        )
        self._stall_timeout, self._warn = stall_timeout, warn

    # ---------------------------------------------------------------- set-up

    def start(self) -> None:
        """Take the signals; to be called from the main thread, as early as can be."""
        self._watcher.start()

    def claim(self) -> None:
        """On rank 0, after ``prepare_output_dir``: lock the folder and start its status file.

        Raises:
            RunError: another run uses the folder.
        """
        lock = OutputLock(self.output_dir, self.launch)
        lock.acquire()
        self._ending.lock = lock
        before = earlier_attempt(self.output_dir, self.launch) or {}
        self.written_before = Path(before["checkpoint"]) if before.get("checkpoint") else None
        status = RunStatus(self.output_dir, self.launch, self._warn, world_size=self.world_size)
        self._ending.status = status
        status.update(checkpoint=before.get("checkpoint"))
        threading.Thread(target=self._beat, args=(status, lock), name="run status", daemon=True).start()

    def join(self, store: KeyStore, address: str = "") -> None:
        """Watch the other ranks from now on; ``store`` is used by another thread (give it a clone), and rank
        0's host is reached at ``address``."""
        if self.world_size > 1:
            self._ending.peers = Peers(
                store,
                self.rank,
                self.world_size,
                self.progress,
                attempt=self.launch.restart_count,
                stall_timeout=self._stall_timeout,
                on_verdict=self._watcher.stalled,
                address=address,
            )

    def all_joined(self) -> None:
        """Every rank has joined: learn where each runs, before the store can go with its process."""
        if self._ending.peers is not None:
            self._ending.peers.refresh()

    # ---------------------------------------------------------------- the loop

    @property
    def stop_flag(self) -> bool:
        """Whether this rank was asked to stop; the loop shares it in its per-step all-reduce."""
        return self._watcher.reason is not None

    def begin(self, step: int) -> None:
        """The loop starts after ``step`` completed steps. Before, a signal ends the process at once."""
        self.progress.mark("step", step)
        self._watcher.clock.begin()
        self.progress.looping = True
        self.record(step=step)

    def boundary(self, step: int) -> None:
        """A step is complete, ``step`` in all, and the ranks have agreed whether to continue or to stop."""
        self._watcher.clock.end("step")
        self.progress.mark("step", step)
        if self._ending.status is not None:
            self._ending.status.note_step(step)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something else than a step: ``save``, ``sample``, ``load``, ``export``, ``verify``, ``compile``."""
        before = self.progress.phase
        self._watcher.clock.begin()
        self.progress.mark(name)
        yield
        # After an error the phase stands, and is named with it.
        self._watcher.clock.end(name)
        self.progress.mark(before)

    def record(self, **fields: Any) -> None:
        """Write fields (``step``, ``checkpoint``) to ``run_status.json``, on the rank that keeps it."""
        if self._ending.status is not None:
            self._ending.status.update(**fields)

    def stop_reason(self) -> str:
        """Why the run stops, once the ranks have agreed to."""
        peers = self._ending.peers
        told = peers.stop_reason() if peers is not None else None
        return self._watcher.reason or told or "a signal to another rank"

    def finish(self, state: str, reason: str | None = None) -> int:
        """The run is done (``finished``) or has stopped and saved (``stopped``): the exit code.

        ``failed`` is for a restart that an earlier attempt has made pointless. To be called on every rank
        after a barrier; signals change nothing any more.
        """
        return self._ending.finish(state, reason)

    def fail(self, error: RunError | None) -> tuple[int, str | None]:
        """The run ends with an error (None: with one that no one expected, whose traceback is shown): the
        exit code, and the line to print (None: another rank prints it, or none does).
        """
        return self._ending.fail(error)

    def explain(self, error: BaseException) -> RunError:
        """What a failed collective means: the end of a peer, by name where it can be found out."""
        return self._ending.explain(error)

    # ---------------------------------------------------------------- inside

    def _beat(self, status: RunStatus, lock: OutputLock) -> None:
        while self._ending.armed:
            status.heartbeat()
            lock.heartbeat()
            time.sleep(HEARTBEAT_SECONDS)
