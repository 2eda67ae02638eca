"""run_status.json: what it says while a run lasts, and what a restart of the same launch makes of it."""

import json
import signal
import time
from pathlib import Path

import pytest

from argonne.ranks.launch import Environment
from argonne.run.control import RunControl
from argonne.run.status import RunStatus, mark_failed
from tests.run.pretended import Start, elastic, ended, status_of, wait_for_step


def test_a_restart_after_a_clean_stop_or_a_lasting_error_ends_at_once(start: Start, tmp_path: Path) -> None:
    ranks = start(1, environ=elastic(most=3))
    wait_for_step(tmp_path, 3)
    ranks[0].send_signal(signal.SIGTERM)
    ended(ranks)
    (again,) = start(1, environ=elastic(restart=1, most=3))
    assert again.communicate(timeout=10)[0] == "already ended\n"
    (other,) = start(1, environ=elastic(restart=1, most=3, run_id="two"), steps=1)
    assert other.communicate(timeout=10)[0] == "claimed\n"
    ended(start(1, environ=elastic(most=3, run_id="three"), fail_at=[0, 1], attempt=9))
    (again,) = start(1, environ=elastic(restart=1, most=3, run_id="three"))
    assert again.communicate(timeout=10)[0] == "already ended\n"


def test_a_name_used_again_by_a_later_launch_is_not_taken_for_an_attempt_of_it(
    start: Start, tmp_path: Path
) -> None:
    ended(start(1, environ=elastic(most=3, run_id="argonne"), fail_at=[0, 1], attempt=9))
    path = tmp_path / "stats" / "run_status.json"
    old = {**json.loads(path.read_text()), "heartbeat": "2020-01-01T00:00:00+0000"}
    path.write_text(json.dumps(old))
    (again,) = start(1, environ=elastic(restart=1, most=3, run_id="argonne"))
    assert (
        again.communicate(timeout=10)[0] == "already ended\n"
    )  # the same process: only the clock has jumped
    path.write_text(json.dumps({**old, "launcher": "another torchrun"}))
    (again,) = start(1, environ=elastic(restart=1, most=3, run_id="argonne"), steps=1)
    assert again.communicate(timeout=10)[0] == "claimed\n"


@pytest.mark.usefixtures("own_signals")
def test_the_status_of_a_restart_keeps_its_launchs_checkpoint(tmp_path: Path) -> None:
    written = {"state": "failed", "checkpoint": "out/pretrained/c.pth", "run_id": "one"}
    (tmp_path / "stats").mkdir()
    path = tmp_path / "stats" / "run_status.json"
    path.write_text(json.dumps({**written, "heartbeat": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))
    launch = Environment.read(environ=elastic(restart=1, most=3)).launch
    control = RunControl(tmp_path, rank=0, world_size=1, launch=launch, warn=print)
    control.claim()
    assert control.written_before == Path("out/pretrained/c.pth")
    assert status_of(tmp_path)["checkpoint"] == "out/pretrained/c.pth"
    control.finish("finished")


def test_the_last_word_counts(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    status = RunStatus(tmp_path, Environment.read(environ={}).launch, print, world_size=3)
    status.note_step(7)
    status.heartbeat()
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["step"]) == ("running", 7)
    status.end("failed", "a reason", final=False)
    status.update(state="running")
    stand = status_of(tmp_path)
    assert (stand["state"], stand["reason"], stand["final"], stand["world_size"]) == (
        "failed",
        "a reason",
        False,
        3,
    )


def test_a_survivor_marks_the_run_of_a_dead_rank_0_failed(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    launch = Environment.read(environ=elastic()).launch
    status = RunStatus(tmp_path, launch, print)
    status.update(step=3)
    mark_failed(tmp_path, Environment.read(environ=elastic(run_id="another")).launch, "not this run", 4)
    assert status_of(tmp_path)["state"] == "running"
    mark_failed(tmp_path, launch, "rank 0 died", 5)
    stand = status_of(tmp_path)
    assert (stand["state"], stand["reason"], stand["step"]) == ("failed", "rank 0 died", 5)


def test_a_disk_that_refuses_costs_the_file_only(tmp_path: Path) -> None:
    warnings: list[str] = []
    status = RunStatus(tmp_path / "nowhere", Environment.read(environ={}).launch, warnings.append)
    status.update(step=1)
    assert len(warnings) == 1 and "run_status.json cannot be written" in warnings[0]
