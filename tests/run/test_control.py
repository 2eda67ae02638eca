"""Stopping, peers, locks and restarts, on pretended training processes (no torch: each starts in 0.1 s)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from argonne.errors import DeviceError
from argonne.ranks.launch import read_launch
from argonne.run.control import STOP_SIGNALS, RunControl, enable_flight_recorder
from argonne.run.lock import OutputLock
from argonne.run.status import prepare_output_dir

WORKER = Path(__file__).with_name("control_worker.py")
Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the ranks of one pretended run; whatever is left at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_ranks(
        world_size: int = 2, environ: dict[str, str] | None = None, **options: Any
    ) -> list[subprocess.Popen[str]]:
        arguments = [sys.executable, str(WORKER), json.dumps({"output_dir": str(tmp_path), **options})]
        own = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
        ranks = [
            subprocess.Popen(
                arguments,
                env={**own, "RANK": str(rank), "WORLD_SIZE": str(world_size), **(environ or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank in range(world_size)
        ]
        started.extend(ranks)
        return ranks

    yield start_ranks
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def wait_for_step(folder: Path, step: int, attempt: int = 0) -> None:
    wait_for(lambda: (folder / f"store_{attempt}" / f"step{step}_0").exists())


def ended(ranks: list[subprocess.Popen[str]], seconds: float = 30.0) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank; fails where one does not end."""
    deadline = time.monotonic() + seconds
    outcomes = []
    for process in ranks:
        _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        outcomes.append((process.returncode, errors))
    return outcomes


def status_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stats" / "run_status.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("target", ["rank 0", "rank 1", "all"])
def test_a_signal_stops_all_ranks_at_one_step(start: Start, tmp_path: Path, number: int, target: str) -> None:
    ranks = start(2)
    wait_for_step(tmp_path, 3)
    for rank in ranks if target == "all" else [ranks[int(target[-1])]]:
        rank.send_signal(number)
    assert ended(ranks) == [(75, ""), (75, "")]
    status = status_of(tmp_path)
    saved = int((tmp_path / "saved").read_text())
    assert (
        status["state"] == "stopped" and status["step"] == saved and status["checkpoint"] == f"step_{saved}"
    )
    assert signal.Signals(number).name in status["reason"]
    assert status["host"] and status["pid"] == ranks[0].pid and status["heartbeat"]


def test_a_finished_run(start: Start, tmp_path: Path) -> None:
    assert ended(start(2, steps=3)) == [(0, ""), (0, "")]
    assert status_of(tmp_path)["state"] == "finished"


def test_a_second_interrupt_leaves_at_once_even_in_a_save(start: Start, tmp_path: Path) -> None:
    ranks = start(2, save_seconds=60)
    wait_for_step(tmp_path, 3)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert all(rank.poll() is None for rank in ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)  # what torchrun sends at a second Ctrl-C
    outcomes = ended(ranks, 8.0)
    assert [code for code, _ in outcomes] == [128 + signal.SIGTERM] * 2
    assert "".join(errors for _, errors in outcomes).count("error: ") == 1
    assert not (tmp_path / "saved").exists()
    assert status_of(tmp_path)["state"] == "stopped"


def test_the_same_signal_twice_at_once_is_one_request(start: Start, tmp_path: Path) -> None:
    ranks = start(2, save_seconds=1.0)
    wait_for_step(tmp_path, 3)
    for _ in range(2):
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert ended(ranks) == [(75, ""), (75, "")]
    assert (tmp_path / "saved").exists()


def test_the_same_signal_again_after_a_while_leaves_at_once(start: Start, tmp_path: Path) -> None:
    ranks = start(2, save_seconds=60)
    wait_for_step(tmp_path, 3)
    for _ in range(2):
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        time.sleep(2.5)
    outcomes = ended(ranks, 8.0)
    assert [code for code, _ in outcomes] == [128 + signal.SIGTERM] * 2
    assert "".join(errors for _, errors in outcomes).count("error: left at once on a second SIGTERM") == 1
    assert not (tmp_path / "saved").exists() and status_of(tmp_path)["state"] == "stopped"


def test_a_signal_before_the_first_step_ends_at_once(start: Start, tmp_path: Path) -> None:
    ranks = start(2, start_seconds=60)
    wait_for(lambda: (tmp_path / "store_0" / "starting_1").exists())
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    assert ended(ranks, 8.0) == [(75, ""), (75, "")]
    assert status_of(tmp_path)["state"] == "stopped"


def test_run_time_is_limited(start: Start, tmp_path: Path) -> None:
    assert ended(start(2, max_run_time=1.0)) == [(75, ""), (75, "")]
    assert "--max-run-time" in status_of(tmp_path)["reason"]


def test_a_run_time_shorter_than_the_set_up_ends_it(start: Start, tmp_path: Path) -> None:
    """The set-up may be hours of tokenizing, whose cache is kept."""
    (code, errors), (other, silent) = ended(start(2, start_seconds=60, max_run_time=1.0), 15.0)
    assert (code, other, silent) == (75, 75, "")
    assert errors == "error: --max-run-time 1 s was over before the first step: give the run more time\n"
    assert status_of(tmp_path)["state"] == "stopped" and status_of(tmp_path)["step"] is None


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
    outcomes = ended(others, 15.0)
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
    outcomes = ended(ranks, 15.0)
    assert [code for code, _ in outcomes] == [1, 1, 1]
    assert [errors for _, errors in outcomes] == ["", "error: shard.parquet is unreadable: remove it\n", ""]
    status = status_of(tmp_path)
    assert status["state"] == "failed" and "shard.parquet" in status["reason"] and status["final"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_stopped_for_ever_is_named(start: Start, tmp_path: Path, victim: int) -> None:
    ranks = start(3, stall_timeout=2.0)
    wait_for_step(tmp_path, 3)
    ranks[victim].send_signal(signal.SIGSTOP)
    outcomes = ended(ranks, 20.0)
    assert outcomes[victim][0] == -signal.SIGKILL
    errors = "".join(errors for _, errors in outcomes)
    assert (
        errors.count("error: ") == 1 and f"rank {victim} gave no sign of life" in errors and "step" in errors
    )


def test_a_rank_stopped_for_a_while_is_waited_for(start: Start, tmp_path: Path) -> None:
    ranks = start(2, stall_timeout=8.0, steps=60)
    wait_for_step(tmp_path, 3)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(3.0)
    ranks[1].send_signal(signal.SIGCONT)
    assert ended(ranks) == [(0, ""), (0, "")]


def test_a_rank_that_hangs_is_named_with_its_stack(start: Start, tmp_path: Path) -> None:
    ranks = start(3, hang_at=[2, 4], stall_timeout=2.0)
    outcomes = ended(ranks, 20.0)
    assert [code for code, _ in outcomes] == [1, 1, 1]
    errors = "".join(errors for _, errors in outcomes)
    assert errors.count("error: ") == 1 and "made no progress" in errors and "last seen in step 3" in errors
    assert "after all_reduce (number 4)" in errors
    assert (
        "time.sleep(1000)" in (WORKER.read_text())
        and "in train" in (tmp_path / "stats/stack_rank_2.txt").read_text()
    )


def test_a_signal_while_a_peer_is_stopped_leaves_naming_it(start: Start, tmp_path: Path) -> None:
    ranks = start(2)
    wait_for_step(tmp_path, 3)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    ranks[0].send_signal(signal.SIGTERM)
    outcomes = ended(ranks, 20.0)
    assert outcomes[0][0] == 1 and "rank 1 is stopped" in outcomes[0][1]
    assert outcomes[1][0] == -signal.SIGKILL


def elastic(restart: int = 0, most: int = 0, run_id: str = "one") -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_MAX_RESTARTS": str(most),
    }


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
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), 10.0)
    status = status_of(tmp_path)
    assert status["state"] == "failed" and "torchrun is gone" in status["reason"]


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


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A run that ends inside this process leaves it deaf to signals, which later children would inherit."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_ignored_signals_of_the_parent(start: Start, tmp_path: Path) -> None:
    """A scheduler's SIGTERM counts even so; a lost terminal under nohup does not."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    (run,) = start(1, steps=5000)
    wait_for_step(tmp_path, 3)
    run.send_signal(signal.SIGHUP)
    wait_for_step(tmp_path, 30)
    run.send_signal(signal.SIGTERM)
    assert ended([run]) == [(75, "")]


@pytest.mark.usefixtures("own_signals")
def test_the_status_of_a_restart_keeps_its_launchs_checkpoint(tmp_path: Path) -> None:
    written = {"state": "failed", "checkpoint": "out/pretrained/c.pth", "run_id": "one"}
    (tmp_path / "stats").mkdir()
    path = tmp_path / "stats" / "run_status.json"
    path.write_text(json.dumps({**written, "heartbeat": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))
    launch = read_launch(elastic(restart=1, most=3))
    control = RunControl(tmp_path, rank=0, world_size=1, launch=launch, warn=print)
    control.claim()
    assert control.written_before == Path("out/pretrained/c.pth")
    assert status_of(tmp_path)["checkpoint"] == "out/pretrained/c.pth"
    control.finish("finished")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match=r"--output-dir .*file/run.* cannot be made or written \(Not a dir"):
        prepare_output_dir(tmp_path / "file" / "run")


def test_a_rank_stopped_before_the_first_step_takes_the_others_along(start: Start, tmp_path: Path) -> None:
    ranks = start(2, environ=elastic(most=1), start_seconds=60)
    wait_for(lambda: (tmp_path / "store_0" / "starting_1").exists())
    ranks[1].send_signal(signal.SIGTERM)
    assert ended(ranks, 60.0) == [(0, ""), (0, "")]  # no failure, which torchrun would answer by a restart
    assert status_of(tmp_path)["state"] == "stopped" and status_of(tmp_path)["final"]


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
    return OutputLock(tmp_path, read_launch({}))


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
    lock = OutputLock(tmp_path, read_launch({}))
    lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    try:
        lock.release()
        second = OutputLock(tmp_path, read_launch({}))
        second.acquire(patience=3.0)  # the child closes its copy as soon as it runs
        second.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_flight_recorder_keeps_what_the_user_set(tmp_path: Path) -> None:
    environ = {"TORCH_FR_BUFFER_SIZE": "7"}
    enable_flight_recorder(tmp_path, environ)
    assert environ["TORCH_FR_BUFFER_SIZE"] == "7" and environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environ["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))


def test_a_save_longer_than_the_grace_time_is_said(tmp_path: Path) -> None:
    alone = RunControl(tmp_path, rank=0, world_size=1, launch=read_launch({}), warn=print)
    assert alone.grace_warning(1000.0) is None
    launched = RunControl(tmp_path, rank=0, world_size=1, launch=read_launch(elastic()), warn=print)
    assert launched.launch.grace_seconds({}) == 30.0
    assert launched.launch.grace_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}) == 90.0
    warning = launched.grace_warning(100.0)
    assert warning is not None and "--shutdown-timeout 600" in warning
