"""What is read of the launcher's variables: by hand, under torchrun, without any."""

import os
import socket
import subprocess
import sys

import pytest

from argonne.errors import ConfigError
from argonne.ranks.launch import Environment
from tests import ROOT
from tests.run.pretended import elastic


def test_no_variables_are_one_process() -> None:
    environ: dict[str, str] = {}
    read = Environment.read(environ=environ)
    assert (read.rank, read.world_size, read.local_rank, read.local_world_size) == (0, 1, 0, 1)
    assert read.master == "localhost:29500" and environ == {}
    launch = read.launch
    assert (launch.run_id, launch.launcher_pid, launch.grace_seconds) == (
        f"{socket.gethostname()}:{os.getpid()}",
        None,
        None,
    )
    assert launch.stop_code == 75


def test_variables_set_by_hand() -> None:
    """The local rank is LOCAL_RANK, else --local-rank, else the rank."""
    environ = {"RANK": "3", "WORLD_SIZE": "4"}
    read = Environment.read(environ=environ)
    assert (read.rank, read.world_size, read.local_rank, read.local_world_size) == (3, 4, 3, None)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("localhost", "29500")
    assert Environment.read(1, environ=environ).local_rank == 1
    assert Environment.read(1, environ={**environ, "LOCAL_RANK": "2"}).local_rank == 2
    placed = {**environ, "MASTER_ADDR": "node", "MASTER_PORT": "7", "LOCAL_WORLD_SIZE": "2"}
    assert Environment.read(environ=placed).master == "node:7"
    assert Environment.read(environ=placed).local_world_size == 2


@pytest.mark.parametrize("environ", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "1"}, {"RANK": "-1"}])
def test_ranks_that_contradict_the_world_size(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="set RANK from 0 to WORLD_SIZE - 1"):
        Environment.read(environ=environ)


def test_torchruns_variables() -> None:
    launch = Environment.read(environ=elastic(restart=1, most=3)).launch
    assert (launch.run_id, launch.restart_count, launch.max_restarts) == ("one", 1, 3)
    assert launch.launcher_pid == os.getppid() and launch.may_restart
    assert launch.grace_seconds == 30.0  # torchrun's own
    told = {**elastic(), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}
    assert Environment.read(environ=told).launch.grace_seconds == 90.0
    unnamed = Environment.read(environ=elastic(run_id="none")).launch
    assert unnamed.run_id == f"{socket.gethostname()}:{os.getppid()}"


@pytest.mark.parametrize("flag", [["--shutdown-timeout=77"], ["--shutdown_timeout", "77"]])
def test_the_grace_time_is_read_from_torchruns_command_line(flag: list[str]) -> None:
    child = "from argonne.ranks.launch import Environment; print(Environment.read().launch.grace_seconds)"
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run(
        [sys.executable, "-c", agent, *flag],
        cwd=ROOT,
        env={**os.environ, **elastic()},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "77.0\n", done.stderr
