"""The run as its loop sees it, without signals and peers: phases, boundaries, the status, the end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.errors import DataError
from argonne.files import OutputFolder
from argonne.ranks.launch import Environment
from argonne.run.control import RunControl
from argonne.run.lock import prepare_output_dir


def control_of(folder: Path, **given: Any) -> RunControl:
    prepare_output_dir(folder)
    launch = Environment.read(environ={}).launch
    common: dict[str, Any] = {"rank": 0, "world_size": 1, "launch": launch, "warn": lambda text: None}
    return RunControl(folder, **{**common, **given})


@pytest.fixture
def control(tmp_path: Path) -> Any:
    """That of rank 0, with the folder claimed."""
    made = control_of(tmp_path)
    made.claim()
    yield made
    made.finish("finished")


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(OutputFolder(folder).status.read_text())
    return found


def test_phases_lie_within_one_another(control: RunControl) -> None:
    control.begin(3)
    assert (control.progress.phase, control.progress.step) == ("step", 3)
    with control.phase("save"):
        assert control.progress.phase == "save"
        with control.phase("verify"):
            assert control.progress.phase == "verify"
        assert control.progress.phase == "save"
    assert control.progress.phase == "step"


def test_after_an_error_its_phase_stands(control: RunControl) -> None:
    control.begin(0)

    def load() -> None:
        with control.phase("load"):
            raise DataError("gone")

    with pytest.raises(DataError):
        load()
    assert control.progress.phase == "load"


def test_the_loop_is_not_under_way_before_it_begins(control: RunControl) -> None:
    before = control.progress.looping
    control.begin(0)
    assert (before, control.progress.looping, control.stop_flag) == (False, True, False)
    control.boundary(1)
    assert control.progress.step == 1


def test_the_status_is_that_of_the_run(tmp_path: Path, control: RunControl) -> None:
    control.begin(7)
    control.record(checkpoint="c.pth", stage="anneal")
    found = status(tmp_path)
    assert (found["step"], found["checkpoint"], found["stage"], found["state"]) == (
        7,
        "c.pth",
        "anneal",
        "running",
    )
    assert found["world_size"] == 1 and control.written_before is None


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_the_end_is_written_and_the_folder_free_again(state: str, tmp_path: Path) -> None:
    control = control_of(tmp_path)
    control.claim()
    control.begin(0)
    code = control.finish(state, "done")
    assert (code == 0) == (state == "finished")
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == (state, "done")
    again = control_of(tmp_path)
    again.claim()
    again.finish("finished")


def test_other_ranks_keep_no_status(tmp_path: Path) -> None:
    other = control_of(tmp_path, rank=1, world_size=2)
    other.begin(0)
    other.record(step=5)
    other.boundary(1)
    assert not OutputFolder(tmp_path).status.exists()


def test_an_error_fails_the_run_with_its_code_and_line(tmp_path: Path) -> None:
    control = control_of(tmp_path)
    control.claim()
    error = DataError("the data is gone (--data-glob): restore it")
    code, line = control.fail(error)
    assert (code, line) == (1, f"error: {error}")
    assert status(tmp_path)["state"] == "failed"


def test_an_error_that_no_one_expected_fails_the_run_without_a_line(tmp_path: Path) -> None:
    control = control_of(tmp_path)
    control.claim()
    assert control.fail(None) == (1, None)
    assert status(tmp_path)["state"] == "failed" and "traceback" in status(tmp_path)["reason"]


def test_why_it_stops_is_this_ranks_reason_or_a_peers(
    control: RunControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert control.stop_reason() == "a signal to another rank"
    monkeypatch.setattr(
        control, "_ending", SimpleNamespace(peers=SimpleNamespace(stop_reason=lambda: "SIGTERM on rank 1"))
    )
    assert control.stop_reason() == "SIGTERM on rank 1"
    monkeypatch.setattr(control, "_watcher", SimpleNamespace(reason="SIGUSR1"))
    assert control.stop_reason() == "SIGUSR1" and control.stop_flag
    monkeypatch.undo()
