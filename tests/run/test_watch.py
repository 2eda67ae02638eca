"""The watching thread: allowed time, a torchrun that is gone, a peer that does not let a step end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from argonne.run.watch import BoundaryClock
from tests.run.pretended import WORKER, Start, elastic, ended, status_of, wait_for, wait_for_step


def test_run_time_is_limited(start: Start, tmp_path: Path) -> None:
    assert ended(start(2, max_run_time=1.0)) == [(75, ""), (75, "")]
    assert "--max-run-time" in status_of(tmp_path)["reason"]


def test_a_run_time_shorter_than_the_set_up_ends_it(start: Start, tmp_path: Path) -> None:
    """The set-up may be hours of tokenizing, whose cache is kept."""
    (code, errors), (other, silent) = ended(start(2, start_seconds=1000, max_run_time=1.0))
    assert (code, other, silent) == (1, 1, "")
    assert errors == "error: --max-run-time 1 s was over before the first step: give the run more time\n"
    assert status_of(tmp_path)["state"] == "stopped" and status_of(tmp_path)["step"] is None


def test_workers_end_when_their_torchrun_is_killed(tmp_path: Path) -> None:
    options = json.dumps({"output_dir": str(tmp_path)})
    script = (
        "import subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, {str(WORKER)!r}, {options!r}], start_new_session=True)\n"
        "print(worker.pid, flush=True)\nworker.wait()\n"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, **elastic()}, stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None
    worker = int(agent.stdout.readline())
    wait_for_step(tmp_path, 3)
    agent.kill()
    agent.communicate()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
    status = status_of(tmp_path)
    assert status["state"] == "failed" and "torchrun is gone" in status["reason"]


def test_a_signal_while_a_peer_is_stopped_leaves_naming_it(start: Start, tmp_path: Path) -> None:
    ranks = start(2)
    wait_for_step(tmp_path, 3)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    ranks[0].send_signal(signal.SIGTERM)
    outcomes = ended(ranks)
    assert outcomes[0][0] == 1 and "rank 1 is stopped" in outcomes[0][1]
    assert outcomes[1][0] == -signal.SIGKILL


def test_a_boundary_is_due_after_three_of_the_longest_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("argonne.run.watch.time.monotonic", lambda: now[0])
    clock = BoundaryClock()
    clock.begin()
    for at, phase in ((40.0, "step"), (41.0, "step"), (43.0, "save")):
        now[0] = at
        clock.end(phase)
    before_a_signal = clock.due
    assert before_a_signal is None
    clock.expect(50.0, "step")
    assert clock.due == 50.0 + 3 * 40.0
    clock.expect(60.0, "step")
    assert clock.due == 170.0  # the first signal counts
    now[0] = 65.0
    clock.end("save")
    assert clock.due == 65.0 + 3 * 22.0
    assert clock.patience("sample") == 10.0  # the least
