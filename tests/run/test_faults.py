"""Faults of whole runs under a real torchrun: signals, dead and stopped ranks, restarts, a shared folder.

Each run takes ten seconds or more; the other files of this folder have the same cases on pretended processes.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import (
    SCHEDULE,
    SHAPE,
    Finished,
    checkpoint,
    launch,
    metrics,
    start,
    status,
    wait,
    wait_for_lines,
)

pytestmark = pytest.mark.slow

LAUNCHER = ("--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
RESTARTS = ("--standalone", "--max-restarts=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=90, length=600)
    return [
        "--tokenizer-path",
        str(tokenizer),
        "--data-glob",
        glob,
        *SHAPE,
        *SCHEDULE,
        "--total-steps",
        "5000",
    ]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes of a torchrun, by local rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in children:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [item.partition(b"=")[2] for item in environ if item.startswith(b"LOCAL_RANK=")]
        if ranks:
            found[int(ranks[0])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def all_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 120.0
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.1)


def stopped_and_saved(output: Path, finished: Finished) -> int:
    """The run's last step, which its status, metrics and newest checkpoint agree about."""
    stand = status(output)
    assert stand["state"] == "stopped", finished.stderr
    assert finished.errors() == []
    step = int(stand["step"])
    assert checkpoint(output, step).exists() and stand["checkpoint"].endswith(f"_step_{step}.pth")
    assert [line["step"] for line in metrics(output)] == list(range(1, step + 1))
    return step


def test_a_signal_to_one_worker_stops_all_and_the_run_goes_on_from_there(
    tmp_path: Path, data: list[str]
) -> None:
    process = start(2, *data, "--output-dir", tmp_path)
    wait_for_lines(tmp_path, 5, process)
    pids = workers_of(process)
    os.kill(pids[1], signal.SIGUSR1)
    step = stopped_and_saved(tmp_path, wait(process))
    assert "SIGUSR1 to rank 1" in status(tmp_path)["reason"]
    all_gone(pids)
    last = ["--total-steps", str(step + 2)]
    again = launch(1, *data, *last, "--output-dir", tmp_path)
    assert again.code == 0 and status(tmp_path)["state"] == "finished", again.stderr
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, step + 3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun(tmp_path: Path, data: list[str], number: signal.Signals) -> None:
    process = start(2, *data, "--output-dir", tmp_path, torchrun=LAUNCHER)
    wait_for_lines(tmp_path, 5, process)
    process.send_signal(number)
    stopped_and_saved(tmp_path, wait(process))


def test_a_second_interrupt_leaves_at_once(tmp_path: Path, data: list[str]) -> None:
    process = start(2, *data, "--output-dir", tmp_path)
    wait_for_lines(tmp_path, 5, process)
    pids = workers_of(process)
    for pid in pids:  # so that no step ends between the two
        os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    wait(process)
    all_gone(pids)
    assert status(tmp_path)["state"] in ("stopped", "failed")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(tmp_path: Path, data: list[str], victim: int) -> None:
    process = start(2, *data, "--output-dir", tmp_path)
    wait_for_lines(tmp_path, 5, process)
    pids = workers_of(process)
    os.kill(pids[victim], signal.SIGKILL)
    finished = wait(process)
    assert finished.code == 1
    all_gone(pids)
    (line,) = finished.errors()
    assert f"rank {victim} died" in line
    stand = status(tmp_path)
    assert stand["state"] == "failed" and f"rank {victim} died" in stand["reason"]
    assert list((tmp_path / "pretrained").iterdir()) == []


def test_workers_end_by_themselves_when_torchrun_is_killed(tmp_path: Path, data: list[str]) -> None:
    process = start(2, *data, "--output-dir", tmp_path)
    wait_for_lines(tmp_path, 5, process)
    pids = workers_of(process)
    process.kill()
    all_gone(pids)
    process.communicate()
    assert status(tmp_path)["state"] == "failed"


def test_a_killed_rank_costs_the_steps_since_the_last_save(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", "4"]
    process = start(2, *flags, torchrun=RESTARTS)
    wait_for_lines(tmp_path, 6, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    deadline = time.monotonic() + 180.0
    while status(tmp_path).get("restart_count") != 1 or status(tmp_path)["step"] is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(workers_of(process)[0], signal.SIGTERM)
    finished = wait(process)
    assert finished.code == 0, finished.stderr  # torchrun must not take a clean stop for a failure
    stand = status(tmp_path)
    assert stand["state"] == "stopped" and stand["restart_count"] == 1
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, int(stand["step"]) + 1))
    assert len(finished.errors()) == 1 and "rank 1 died" in finished.errors()[0]


def test_a_lasting_error_is_not_trained_again(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-path", tmp_path / "nowhere.pth"]
    finished = wait(start(2, *flags, torchrun=RESTARTS))
    errors = finished.errors()
    assert finished.code == 1 and "nowhere.pth" in errors[0]
    assert all("would end the same way" in line for line in errors[1:]) and len(errors) == 3
    assert status(tmp_path)["state"] == "failed"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_stopped_for_ever_is_named(tmp_path: Path, data: list[str], victim: int) -> None:
    process = start(2, *data, "--output-dir", tmp_path, "--stall-timeout", "5")
    wait_for_lines(tmp_path, 5, process)
    time.sleep(3.0)  # ranks tell each other of their steps about once a second
    pids = workers_of(process)
    os.kill(pids[victim], signal.SIGSTOP)
    finished = wait(process, 60.0)
    all_gone(pids)
    (line,) = finished.errors()
    assert finished.code == 1 and f"rank {victim} gave no sign of life for 5 s" in line and "step" in line
    assert "(number " in line  # of its last collective
    assert status(tmp_path)["state"] == "failed"


def test_a_rank_stopped_for_ten_seconds_is_waited_for(tmp_path: Path, data: list[str]) -> None:
    process = start(2, *data, "--output-dir", tmp_path)
    wait_for_lines(tmp_path, 5, process)
    victim = workers_of(process)[1]
    os.kill(victim, signal.SIGSTOP)
    time.sleep(10.0)
    os.kill(victim, signal.SIGCONT)
    wait_for_lines(tmp_path, len(metrics(tmp_path)) + 5, process)
    process.send_signal(signal.SIGTERM)
    stopped_and_saved(tmp_path, wait(process))


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, data: list[str]) -> None:
    first = start(2, *data, "--output-dir", tmp_path)
    wait_for_lines(tmp_path, 5, first)
    second = launch(2, *data, "--output-dir", tmp_path)
    (line,) = second.errors()
    assert second.code == 1 and str(workers_of(first)[0]) in line
    first.send_signal(signal.SIGTERM)
    stopped_and_saved(tmp_path, wait(first))


def test_the_time_of_a_run_is_limited(tmp_path: Path, data: list[str]) -> None:
    finished = launch(1, *data, "--output-dir", tmp_path, "--max-run-time", "40")
    assert finished.code == 75
    stopped_and_saved(tmp_path, finished)
    assert "--max-run-time" in status(tmp_path)["reason"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(
    data: list[str], tmp_path: Path, compiled: bool
) -> None:
    """Compiled steps count no collective: torch's recorder does."""
    flags = [*data, "--output-dir", tmp_path, "--stall-timeout", "60" if compiled else "8"]
    fault = {"kind": "hang", "rank": 1, "step": 4}
    finished = launch(2, *flags, *(["--compile"] if compiled else []), fault=fault, timeout=400)
    assert finished.code == 1
    (line,) = finished.errors()
    assert line.startswith("error: rank 1 made no progress for ")
    assert " s (--stall-timeout) while rank 0 waits in all_reduce " in line
    assert " of all ranks, last seen in step 3, step: check that process, its GPU and its host" in line
