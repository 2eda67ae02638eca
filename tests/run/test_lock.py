"""The claim on an output folder: it takes files, and one run at a time has it."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from argonne.errors import DeviceError
from argonne.ranks.launch import Environment
from argonne.run.lock import OutputLock, prepare_output_dir
from tests.run.pretended import Start, elastic, ended, status_of, wait_for_step


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match=r"--output-dir .*file/run.* cannot be made or written \(Not a dir"):
        prepare_output_dir(tmp_path / "file" / "run")


def test_a_killed_attempt_is_taken_over_by_the_restart(start: Start, tmp_path: Path) -> None:
    (first,) = start(1, environ=elastic(most=3))
    wait_for_step(tmp_path, 3)
    first.kill()
    first.wait()
    assert ended(start(1, environ=elastic(restart=1, most=3), steps=2)) == [(0, "")]


def test_a_second_run_in_one_folder_is_refused_and_names_the_first(start: Start, tmp_path: Path) -> None:
    (first,) = start(1, steps=5000)
    wait_for_step(tmp_path, 3)
    (second,) = start(1, attempt=5)
    ((code, errors),) = ended([second])
    assert code == 1 and errors.count("error: ") == 1 and f"process {first.pid}" in errors
    assert status_of(tmp_path)["state"] == "running" and first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert ended([first]) == [(75, "")]


def lock_file(tmp_path: Path, **holder: Any) -> OutputLock:
    (tmp_path / "stats").mkdir(exist_ok=True)
    (tmp_path / "stats" / "run.lock").write_text(json.dumps({"owner": "ada", "run_id": "other", **holder}))
    return OutputLock(tmp_path, Environment.read(environ={}).launch)


def test_a_lock_of_a_dead_process_or_an_old_heartbeat_is_taken_over(tmp_path: Path) -> None:
    for holder in (
        {"host": os.uname().nodename, "pid": 2**22 - 1, "process_started": "1", "heartbeat": time.time()},
        {"host": "elsewhere", "pid": 1, "heartbeat": time.time() - 1000, "beat": 1},
        {"host": "elsewhere", "pid": 1, "heartbeat": time.time() + 10_000, "beat": 1},
    ):
        lock = lock_file(tmp_path, **holder)
        lock.acquire()
        assert json.loads((tmp_path / "stats" / "run.lock").read_text())["pid"] == os.getpid()
        lock.release()
        assert (tmp_path / "stats" / "run.lock").read_text() == ""


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    lock = OutputLock(tmp_path, Environment.read(environ={}).launch)
    lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    try:
        lock.release()
        second = OutputLock(tmp_path, Environment.read(environ={}).launch)
        second.acquire(patience=3.0)  # the child closes its copy as soon as it runs
        second.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
