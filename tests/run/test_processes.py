"""The launcher's record, and processes as /proc shows them."""

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from argonne.run.processes import Launch, command_line, process_began, process_started
from tests import ROOT
from tests.run.pretended import wait_for


def launch_of(**changes: Any) -> Launch:
    return Launch(**{"run_id": "one", "restart_count": 0, "max_restarts": 0, "launcher_pid": None, **changes})


def test_a_stop_is_no_failure_where_torchrun_may_restart() -> None:
    assert launch_of().stop_code == 75 and launch_of().unsaved_code(130) == 130
    assert launch_of(max_restarts=3).unsaved_code(130) == 0
    assert launch_of(max_restarts=3).stop_code == 0
    assert launch_of(max_restarts=3, restart_count=3).stop_code == 75


def test_a_save_longer_than_torchruns_patience_is_said() -> None:
    assert launch_of().grace_warning(1000.0) is None
    launched = launch_of(grace_seconds=30.0)
    assert launched.grace_warning(23.0) is None
    assert "--shutdown-timeout 600" in str(launched.grace_warning(100.0))
    assert "--shutdown-timeout 1500" in str(launched.grace_warning(500.0))


def test_a_process_is_told_from_a_later_one_of_its_pid() -> None:
    before = time.time()
    process = subprocess.Popen(["sleep", "1000"])
    try:
        started = process_started(process.pid)
        assert started is not None and started.isdigit()
        wait_for(
            lambda: command_line(process.pid)[:2] == ["sleep", "1000"]
        )  # once it has replaced its parent's
        assert before - 5.0 < process_began(process.pid) < time.time() + 5.0
    finally:
        process.kill()
    wait_for(lambda: process_started(process.pid) is None)  # a corpse until it is waited for
    process.wait()
    assert process_began(process.pid) == 0.0 and command_line(process.pid) == []


def test_children_of_all_threads_are_ended() -> None:
    script = (
        "import subprocess, threading\n"
        "from argonne.run.processes import kill_children\n"
        "children = [subprocess.Popen(['sleep', '60'])]\n"
        "threading.Thread(target=lambda: children.append(subprocess.Popen(['sleep', '60']))).start()\n"
        "while len(children) < 2: pass\n"
        "kill_children()\n"
        "print([child.wait(20) for child in children])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[-9, -9]\n", done.stderr


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("return 3", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('error: no such file')", 1, "error: no such file"),
        ("raise ZeroDivisionError('oh no')", 1, "ZeroDivisionError: oh no"),
    ],
)
def test_a_program_ends_without_its_threads_and_says_all(body: str, code: int, last: str) -> None:
    script = (
        "import sys, threading, time\n"
        "from argonne.run.processes import end_with\n"
        "def main():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"  # Python would wait for it
        "    sys.stdout.write('written')\n"
        f"    {body}\n"
        "end_with(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (code, "written")
    assert (done.stderr.splitlines() or [""])[-1] == last


def test_a_program_ends_with_its_code_where_its_reader_has_left() -> None:
    script = "from argonne.run.processes import leave\nprint('x' * 100)\nleave(5)\n"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, env=buffered)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 5
