"""What is read of the launcher's variables: by hand, under torchrun, without any."""

import os
import socket
import subprocess
import sys

import pytest

from argonne.errors import ConfigError
from argonne.ranks.launch import Environment
from argonne.testing.launch import environment
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


def test_an_empty_variable_is_none() -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": " ", "MASTER_PORT": "", "LOCAL_RANK": ""}
    read = Environment.read(environ=environ)
    assert (read.local_rank, read.master) == (1, "localhost:29500")
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("localhost", "29500")
    assert Environment.read(environ={"RANK": "", "SLURM_NTASKS": ""}).world_size == 1


TWO = {"RANK": "1", "WORLD_SIZE": "2"}
HOW = "set RANK from 0 to WORLD_SIZE - 1 and WORLD_SIZE on every process, or start them with torchrun"


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, f"RANK is 'x', which is no whole number: {HOW}"),
        ({"RANK": "1.0", "WORLD_SIZE": "two"}, "RANK is '1.0', WORLD_SIZE is 'two', which is no"),
        ({**TWO, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', which is no whole number"),
        ({**TWO, "LOCAL_RANK": "gpu1"}, "LOCAL_RANK is 'gpu1'"),
        ({**TWO, "LOCAL_WORLD_SIZE": "-"}, "LOCAL_WORLD_SIZE is '-'"),
        ({**elastic(), "TORCHELASTIC_RESTART_COUNT": "a"}, "TORCHELASTIC_RESTART_COUNT is 'a'"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, f"RANK is 4 and WORLD_SIZE is 4: {HOW}"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, f"RANK is -1 and WORLD_SIZE is 4: {HOW}"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"RANK": "1"}, f"RANK is 1 and WORLD_SIZE is not set: {HOW}"),
        ({"WORLD_SIZE": "2"}, f"WORLD_SIZE is 2 and RANK is not set: {HOW}"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3 and WORLD_SIZE is not set: set LOCAL_RANK"),
        ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and WORLD_SIZE is 2"),
        ({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1 and LOCAL_WORLD_SIZE is 1"),
        ({**TWO, "LOCAL_RANK": "-1"}, "LOCAL_RANK is -1"),
        ({**TWO, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3 and WORLD_SIZE is 2"),
        ({**TWO, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0 and WORLD_SIZE is 2"),
        ({**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000: give a port from 1 to 65535"),
    ],
)
def test_variables_that_cannot_be(environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Environment.read(environ=environ)
    assert str(refusal.value).startswith(text) and "\n" not in str(refusal.value)


FOREIGN = [
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    {"SLURM_PROCID": "1"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"OMPI_COMM_WORLD_RANK": "1"},
    {"PMI_SIZE": "2", "PMI_RANK": "0"},
]


@pytest.mark.parametrize("environ", FOREIGN)
def test_a_launcher_of_several_processes_that_starts_no_ranks(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="would train alone: start torchrun once per node") as refusal:
        Environment.read(environ=environ)
    assert "set RANK=0 WORLD_SIZE=1 for a single process" in str(refusal.value)
    assert Environment.read(environ={**environ, "RANK": "0", "WORLD_SIZE": "1"}).world_size == 1
    assert Environment.read(environ={**environ, **TWO}).rank == 1  # by hand from that launcher's variables
    assert Environment.read(environ={**environ, **elastic()}).world_size == 1


def test_one_task_of_slurm_is_one_process() -> None:
    one = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "77", "SLURM_NNODES": "1"}
    assert Environment.read(environ=one).world_size == 1


def test_every_rank_says_so_before_torch_is_imported() -> None:
    script = (
        "import sys\nimport resume_pretrain_tensor as entry\n"
        "code = entry.main(['--tokenizer-path', 'tok'])\n"
        "print(code, 'torch' in sys.modules)\n"
    )
    for rank in ("0", "1"):
        environ = {**environment(), "RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": "abc"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.stdout == "2 False\n"
        assert done.stderr.startswith("error: MASTER_PORT is 'abc'") and done.stderr.count("\n") == 1


def test_torchruns_variables() -> None:
    launch = Environment.read(environ=elastic(restart=1, most=3)).launch
    assert (launch.run_id, launch.restart_count, launch.max_restarts) == ("one", 1, 3)
    assert launch.launcher_pid == os.getppid() and launch.may_restart
    assert launch.grace_seconds == 30.0  # torchrun's own
    told = {**elastic(), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}
    assert Environment.read(environ=told).launch.grace_seconds == 90.0
    odd = {**elastic(), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon"}
    assert Environment.read(environ=odd).launch.grace_seconds == 30.0
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
