"""The launcher's record, and processes as /proc shows them."""

import subprocess
import sys
import time
from typing import Any

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
