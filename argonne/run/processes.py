"""Processes of this host as /proc shows them, what launched this one, and how it ends."""

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from argonne.errors import EXIT_FAILURE, EXIT_STOPPED


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
    grace_seconds: float | None = None
    """how long torchrun waits after a signal before it kills its workers; None without torchrun"""
    launcher: str = ""
    """host, process and start of torchrun, which no other launch shares; "" without torchrun"""

    @property
    def may_restart(self) -> bool:
        """Whether torchrun would start the workers again after an exit code that is not 0."""
        return self.restart_count < self.max_restarts

    @property
    def stop_code(self) -> int:
        """Exit code of a run stopped by a signal after saving: 75, but 0 where that would restart it."""
        return 0 if self.may_restart else EXIT_STOPPED

    def unsaved_code(self, code: int) -> int:
        """Exit code of a run stopped with nothing saved: ``code``, but 0 where that would restart it."""
        return 0 if self.may_restart else code

    def grace_warning(self, save_seconds: float) -> str | None:
        """What to warn of at the start where a save takes longer than torchrun waits after a signal."""
        grace = self.grace_seconds
        if grace is None or save_seconds < 0.8 * grace:
            return None
        return (
            f"a save takes about {save_seconds:.0f} s, but torchrun kills its workers {grace:.0f} s after a "
            f"signal: start it with --shutdown-timeout {max(600, 3 * round(save_seconds))}"
        )


def command_line(pid: int) -> list[str]:
    """The words that a process was started with; none where that cannot be told."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


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


def leave(code: int, line: str | None = None) -> NoReturn:
    """Say the last line and end the process without its threads.

    They may still sit in collectives or store calls that no peer will answer, and C++ aborts (-6) a process
    whose interpreter goes away under them: gloo's own take the interpreter's lock to free what they hold.
    """
    for stream, last in ((sys.stderr, line), (sys.stdout, None)):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream that was closed or broke
            if last is not None:
                print(last, file=stream)
            stream.flush()
    os._exit(code)


def end_with(main: Callable[[], int]) -> NoReturn:
    """How a program that makes process groups runs its ``main`` and ends: with `leave`, whatever main raises.

    The exit codes are Python's own: what main returns, that of a SystemExit, 1 after a traceback.
    """
    try:
        leave(main())
    except SystemExit as ended:
        if isinstance(ended.code, str):
            leave(EXIT_FAILURE, ended.code)
        leave(ended.code or 0)
    except BaseException:  # noqa: BLE001
        # The process boundary, where Python itself would print the traceback, and then let its threads go.
        traceback.print_exc()
        leave(EXIT_FAILURE)
