"""How a run ends: exit codes, who says the one line, what the others and the status learn."""

import signal
from pathlib import Path

import pytest

from argonne.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    NonFiniteError,
    PeerError,
    RunError,
)
from argonne.ranks.launch import Environment
from argonne.run.control import RunControl
from argonne.run.ending import is_final
from tests.run.pretended import Start, elastic, ended, status_of, wait_for_step


def test_a_finished_run(start: Start, tmp_path: Path) -> None:
    assert ended(start(2, steps=3)) == [(0, ""), (0, "")]
    assert status_of(tmp_path)["state"] == "finished"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("with_signal", [True, False])
def test_a_dead_rank_is_named_and_nothing_is_saved(
    start: Start, tmp_path: Path, victim: int, with_signal: bool
) -> None:
    ranks = start(3)
    wait_for_step(tmp_path, 3)
    ranks[victim].kill()
    ranks[victim].wait()
    others = [rank for rank in ranks if rank is not ranks[victim]]
    if with_signal:  # as torchrun does
        for rank in others:
            rank.send_signal(signal.SIGTERM)
    outcomes = ended(others)
    assert [code for code, _ in outcomes] == [1, 1]
    errors = "".join(errors for _, errors in outcomes)
    assert errors.count("error: ") == 1 and f"rank {victim} died" in errors
    assert not (tmp_path / "saved").exists()
    assert status_of(tmp_path)["state"] == ("running" if victim == 0 else "failed")


def test_an_error_of_one_rank_is_said_once(start: Start, tmp_path: Path) -> None:
    ranks = start(3, fail_at=[1, 3])
    ranks[1].wait()
    for rank in (ranks[0], ranks[2]):
        rank.send_signal(signal.SIGTERM)
    outcomes = ended(ranks)
    assert [code for code, _ in outcomes] == [1, 1, 1]
    assert [errors for _, errors in outcomes] == ["", "error: shard.parquet is unreadable: remove it\n", ""]
    status = status_of(tmp_path)
    assert status["state"] == "failed" and "shard.parquet" in status["reason"] and status["final"]


def test_stopping_does_not_look_like_a_failure_to_a_restarting_torchrun(start: Start, tmp_path: Path) -> None:
    ranks = start(1, environ=elastic(most=3))
    wait_for_step(tmp_path, 3)
    ranks[0].send_signal(signal.SIGTERM)
    assert ended(ranks) == [(0, "")]
    assert ended(start(1, environ=elastic(most=3), steps=2, attempt=7)) == [(0, "")]
    ranks = start(1, environ=elastic(restart=3, most=3, run_id="last attempt"))
    wait_for_step(tmp_path, 3, attempt=3)
    ranks[0].send_signal(signal.SIGTERM)
    assert ended(ranks) == [(75, "")]


def test_errors_that_a_restart_would_repeat() -> None:
    lasting = (ConfigError, DataError, CheckpointError, NonFiniteError)
    passing = (RunError, DeviceError, PeerError)
    assert all(is_final(kind("x")) for kind in lasting)
    assert not any(is_final(kind("x")) for kind in passing)


def test_a_failed_collective_without_a_known_peer(tmp_path: Path) -> None:
    """The first line of torch's message is kept; what is an error of the run stays what it is."""
    control = RunControl(
        tmp_path, rank=1, world_size=2, launch=Environment.read(environ={}).launch, warn=print
    )
    said = control.explain(RuntimeError("[gloo] Connection closed\nframes"))
    assert isinstance(said, PeerError) and "in step 0 on rank 1 ([gloo] Connection closed)" in str(said)
    error = DataError("a")
    assert control.explain(error) is error
