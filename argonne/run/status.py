"""How a run stands: ``stats/run_status.json``, for people, schedulers and the restart of the same launch.

Rank 0 writes it; nothing here knows torch.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from argonne.files import OutputFolder, read_json, write_json
from argonne.run.processes import Launch


def now() -> str:
    """Wall time with its zone, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class RunStatus:
    """``stats/run_status.json``, rewritten at each change and every few seconds.

    A disk that refuses it costs the file, not the run: ``warn`` is told.
    """

    def __init__(self, output_dir: Path, launch: Launch, warn: Callable[[str], None], **facts: Any) -> None:
        self._path = OutputFolder(output_dir).status
        self._warn = warn
        self._began = time.monotonic()
        self._mutex = threading.Lock()
        self._closed = False
        self._fields: dict[str, Any] = {
            "state": "running",
            "step": None,
            "checkpoint": None,
            "reason": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": now(),
            "run_id": launch.run_id,
            "restart_count": launch.restart_count,
            "launcher": launch.launcher,
            "final": False,
            **facts,
        }

    def update(self, **fields: Any) -> None:
        """Change fields (``state``, ``step``, ``checkpoint``, ``reason``, ...) and write the file."""
        with self._mutex:
            if not self._closed:
                self._fields |= fields
                self._write()

    def note_step(self, step: int) -> None:
        """Remember the step; the next heartbeat writes it."""
        self._fields["step"] = step

    def heartbeat(self) -> None:
        """Write the file with the current time."""
        self.update()

    def end(self, state: str, reason: str | None = None, *, final: bool = True) -> None:
        """The last word: ``finished``, ``stopped`` or ``failed``. Later calls change nothing.

        ``final``: a restart by the same torchrun ends at once instead of resuming.
        """
        with self._mutex:
            if not self._closed:
                self._fields |= {"state": state, "reason": reason, "final": final}
                self._write()
                self._closed = True

    def _write(self) -> None:
        fields = {**self._fields, "heartbeat": now(), "uptime_seconds": time.monotonic() - self._began}
        try:
            write_json(self._path, fields)
        except OSError as error:
            self._warn(f"{self._path} cannot be written ({error.strerror}): the run continues without it")


def mark_failed(output_dir: Path, launch: Launch, reason: str, step: int) -> None:
    """Say in the status of a run whose rank 0 died that it failed; for a surviving rank of the same run.

    ``step``: the last one that this rank completed.
    """
    path = OutputFolder(output_dir).status
    status = read_json(path)
    if status is None or status.get("state") != "running" or status.get("run_id") != launch.run_id:
        return
    try:
        step = max(step, int(status.get("step") or 0))
        write_json(path, {**status, "state": "failed", "reason": reason, "step": step, "heartbeat": now()})
    except OSError:
        pass  # the heartbeat in the file grows old, which tells the same


def earlier_attempt(output_dir: Path, launch: Launch) -> dict[str, Any] | None:
    """The status that an earlier attempt of this same torchrun left, or None."""
    status = read_json(OutputFolder(output_dir).status)
    if status is None or launch.restart_count == 0 or status.get("run_id") != launch.run_id:
        return None
    if launch.launcher and status.get("launcher") == launch.launcher:
        return status
    # Rank 0 may have moved to another node, whose torchrun is another process of the same launch.
    try:
        written = datetime.fromisoformat(str(status.get("heartbeat"))).timestamp()
    except ValueError:
        return None
    # The name may be that of an older launch, whose end says nothing about this one.
    return status if written >= launch.began - 2.0 else None


def already_ended(output_dir: Path, launch: Launch) -> dict[str, Any] | None:
    """The status of an earlier attempt of this same torchrun after which nothing is left to do, or None."""
    status = earlier_attempt(output_dir, launch)
    if status is None or status.get("state") == "running" or not status.get("final"):
        return None
    return status
