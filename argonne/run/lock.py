"""The claim on an output folder: it takes files, and one run at a time writes it."""

import errno
import fcntl
import getpass
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from argonne.errors import DeviceError, RunError
from argonne.files import OutputFolder
from argonne.run.processes import Launch, process_started

HEARTBEAT_SECONDS = 5.0
"""How often the holder says that it lives."""
STALE_SECONDS = 120.0
"""A holder on another host that was silent for so long is gone."""


def prepare_output_dir(output_dir: Path) -> None:
    """Make ``pretrained/`` and ``stats/``, and try that both take a file.

    Raises:
        DeviceError: the folder cannot be made or written; the line names folder and reason.
    """
    folders = OutputFolder(output_dir)
    for folder in (folders.pretrained, folders.stats):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(b"x")
        except OSError as error:
            raise DeviceError(
                f"--output-dir {output_dir}: {folder} cannot be made or written "
                f"({error.strerror}): choose another folder, or free it"
            ) from error


class OutputLock:
    """One run per output folder: a locked file that says who holds it.

    The kernel drops the lock with the process, so the file of a dead run on this host is free at once. For a
    holder on another host, whose lock a network disk may not show, the heartbeat in the file decides.
    """

    def __init__(self, output_dir: Path, launch: Launch) -> None:
        self.path = OutputFolder(output_dir).lock
        self._launch = launch
        self._file: int | None = None
        self._beat = 0

    def acquire(self, patience: float = 5.0) -> None:
        """Take the folder, waiting ``patience`` seconds for a run that is just ending.

        Raises:
            RunError: another run uses it; the line names its owner, host and process.
            DeviceError: the lock file cannot be made.
        """
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DeviceError(
                f"{self.path} cannot be opened ({error.strerror}): check --output-dir"
            ) from error
        if not self._lock(patience):
            self._refuse(self._holder())
        holder = self._holder()
        if holder is not None and self._is_alive(holder):
            self._refuse(holder)
        os.register_at_fork(after_in_child=self._close)
        self.heartbeat()

    def heartbeat(self) -> None:
        """Say in the file that the holder lives; a disk that refuses is left alone."""
        if self._file is None:
            return
        self._beat += 1
        holder = {
            "owner": getpass.getuser() if "USER" in os.environ else str(os.getuid()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": process_started(os.getpid()),
            "run_id": self._launch.run_id,
            "heartbeat": time.time(),
            "beat": self._beat,
        }
        text = json.dumps(holder).ljust(512).encode() + b"\n"
        try:
            os.pwrite(self._file, text, 0)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE):
                raise

    def release(self) -> None:
        """Give up the folder; calling it again does nothing."""
        if self._file is not None:
            try:
                os.ftruncate(self._file, 0)
            except OSError:
                pass  # the lock itself goes with the descriptor
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, patience: float) -> bool:
        assert self._file is not None
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                    return True  # a disk without locks: the heartbeat alone decides
                if time.monotonic() > deadline:
                    return False
            time.sleep(0.1)

    def _holder(self) -> dict[str, Any] | None:
        assert self._file is not None
        try:
            holder = json.loads(os.pread(self._file, 4096, 0))
        except (OSError, ValueError):
            return None
        return holder if isinstance(holder, dict) else None

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == socket.gethostname():
            started = process_started(int(holder.get("pid") or 0))
            return started is not None and started == holder.get("process_started")
        if abs(time.time() - float(holder.get("heartbeat") or 0)) > STALE_SECONDS:
            return False
        deadline = time.monotonic() + 2.5 * HEARTBEAT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            latest = self._holder()
            if latest is not None and latest.get("beat") != holder.get("beat"):
                return True
        return False

    def _refuse(self, holder: dict[str, Any] | None) -> None:
        self._close()
        who = "another run"
        if holder is not None:
            who = f"{holder.get('owner')} on {holder.get('host')}, process {holder.get('pid')},"
        raise RunError(
            f"--output-dir {self.path.parent.parent} is in use by {who} (lock file {self.path}): "
            f"wait for it, stop it, or give another --output-dir"
        )
