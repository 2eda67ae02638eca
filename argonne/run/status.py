"""The output folder: may we write there, does another run use it, and how does this run stand.

``stats/run_status.json`` is for people and schedulers; ``stats/run.lock`` keeps two runs out of one folder.
Rank 0 uses this module; nothing here knows torch.
"""

import contextlib
import dataclasses
import errno
import fcntl
import getpass
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from argonne.errors import (
    EXIT_STOPPED,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    NonFiniteError,
    RunError,
)
from argonne.files import read_json, write_json

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What started this process, and whether that would start it again."""

    run_id: str
    """the same for all attempts of one torchrun, different for another one"""
    restart_count: int
    max_restarts: int
    launcher_pid: int | None
    """torchrun's process; None without torchrun"""
    began: float = 0.0
    """when torchrun was started, seconds since 1970; a run_id may be used again by a later launch"""
    launcher: str = ""
    """host, process and start of torchrun, which no other launch shares; "" without torchrun"""

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> "Launch":
        """From torchrun's variables."""
        environ = os.environ if environ is None else environ
        name = environ.get("TORCHELASTIC_RUN_ID")
        if name is None:
            own = f"{socket.gethostname()}:{os.getpid()}"
            return cls(run_id=own, restart_count=0, max_restarts=0, launcher_pid=None)
        # "none" is torchrun's name for every run that was given none.
        run_id = name if name not in ("", "none") else f"{socket.gethostname()}:{os.getppid()}"
        began = process_started(os.getppid())
        return cls(
            run_id=run_id,
            launcher=f"{socket.gethostname()}:{os.getppid()}:{began}",
            restart_count=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            max_restarts=int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")),
            launcher_pid=os.getppid(),
            began=process_began(os.getppid()),
        )

    @property
    def may_restart(self) -> bool:
        """Whether torchrun would start the workers again after an exit code that is not 0."""
        return self.restart_count < self.max_restarts

    @property
    def stop_code(self) -> int:
        """Exit code of a run stopped by a signal after saving: 75, but 0 where that would restart it."""
        return 0 if self.may_restart else EXIT_STOPPED

    def grace_seconds(self, environ: Mapping[str, str]) -> float | None:
        """How long torchrun waits after a signal before it kills its workers; None without torchrun."""
        if self.launcher_pid is None:
            return None
        try:
            words = (
                Path(f"/proc/{self.launcher_pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            )
        except OSError:
            words = []
        for index, word in enumerate(words):
            name, _, value = word.partition("=")
            if name.replace("_", "-") == "--shutdown-timeout":
                return float(value or words[index + 1])
        return float(environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def is_final(error: RunError) -> bool:
    """Whether a restart would only repeat the error.

    Flags, data and checkpoints do not mend themselves, and steps that were not finite come again with the
    same weights and tokens.
    """
    return isinstance(error, ConfigError | DataError | CheckpointError | NonFiniteError)


def prepare_output_dir(output_dir: Path) -> None:
    """Make ``pretrained/`` and ``stats/``, and try that both take a file.

    Raises:
        DeviceError: the folder cannot be made or written; the line names folder and reason.
    """
    for folder in (output_dir / "pretrained", output_dir / "stats"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(b"x")
        except OSError as error:
            raise DeviceError(
                f"--output-dir {output_dir}: {folder} cannot be made or written "
                f"({error.strerror}): choose another folder, or free it"
            ) from error


def now() -> str:
    """Wall time with its zone, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class RunStatus:
    """``stats/run_status.json``, rewritten at each change and every few seconds.

    A disk that refuses it costs the file, not the run: ``warn`` is told.
    """

    def __init__(self, output_dir: Path, launch: Launch, warn: Callable[[str], None], **facts: Any) -> None:
        self._path = output_dir / "stats" / "run_status.json"
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

        ``final``: a restart by the same torchrun ends at once instead of going on.
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
            self._warn(f"{self._path} cannot be written ({error.strerror}): the run goes on without it")


def mark_failed(output_dir: Path, launch: Launch, reason: str, step: int) -> None:
    """Say in the status of a run whose rank 0 died that it failed; for a surviving rank of the same run.

    ``step``: as far as that rank has come.
    """
    path = output_dir / "stats" / "run_status.json"
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
    status = read_json(output_dir / "stats" / "run_status.json")
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


def process_began(pid: int) -> float:
    """Wall time at which a process was started, in seconds since 1970; 0 where that cannot be told."""
    fields = process_fields(pid)
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def process_fields(pid: int) -> list[str] | None:
    """``/proc/PID/stat`` from the state letter on; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def process_started(pid: int) -> str | None:
    """When the kernel started a process, in ticks since boot, which tells it from a later one of its pid.

    None: there is no such process, or only its corpse.
    """
    fields = process_fields(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def kill_children() -> None:
    """End this process's children: data processes would outlive an ``os._exit``."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(int(pid), signal.SIGKILL)


class OutputLock:
    """One run per output folder: a locked file that says who holds it.

    The kernel drops the lock with the process, so the file of a dead run on this host is free at once. For a
    holder on another host, whose lock a network disk may not show, the heartbeat in the file decides.
    """

    def __init__(self, output_dir: Path, launch: Launch) -> None:
        self.path = output_dir / "stats" / "run.lock"
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
        """Give the folder free; calling it again does nothing."""
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
