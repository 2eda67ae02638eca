"""Ranks and nodes that never join or do not fit, and ranks that die before the first step: one line each."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from argonne.ranks.meeting import await_endpoint
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import ROOT, SCHEDULE, SHAPE, Finished, command, environment, start, status, wait

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=60, length=600)
    return [
        *["--tokenizer-path", str(tokenizer), "--data-glob", glob, *SHAPE, *SCHEDULE],
        *["--total-steps", str(STEPS), "--checkpoint-interval", str(STEPS)],
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def by_hand(rank: int, world_size: int, port: int, *flags: Any, fault: Any = None) -> subprocess.Popen[str]:
    """One rank started without torchrun."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return subprocess.Popen(
        command(1, *flags, fault=fault),
        env={**environment(), **place, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def the_error(finished: Finished) -> str:
    assert finished.code == 1, finished.stderr
    (line,) = finished.errors()
    return line


def test_an_endpoint_that_comes_late_or_never() -> None:
    port = free_port()
    assert not await_endpoint("localhost", port, 0.3)
    assert not await_endpoint("no.such.host.invalid", port, 0.3)
    with socket.create_server(("localhost", port)):
        assert await_endpoint("localhost", port, 180.0)


@pytest.mark.slow
def test_other_ranks_that_never_come_are_said_with_the_endpoint(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path, "--stall-timeout", 6]
    ports = [free_port(), free_port()]
    first, second = (wait(process) for process in [by_hand(r, 2, ports[r], *flags) for r in (0, 1)])
    assert f"cannot join the others at localhost:{ports[0]}" in the_error(first)
    assert "1/2 clients joined" in the_error(first)
    assert f"could not connect to localhost:{ports[1]} (MASTER_ADDR:MASTER_PORT) within 6 s" in the_error(
        second
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupt_while_the_other_ranks_are_awaited(tmp_path: Path, data: list[str]) -> None:
    port = free_port()
    process = by_hand(0, 2, port, *data, "--output-dir", tmp_path)
    assert await_endpoint("localhost", port, 180.0)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    finished = wait(process)
    assert finished.code == 128 + signal.SIGINT and "stopped by SIGINT before" in finished.stderr


PLACES = {
    "before it reached the store": ("argonne.ranks.meeting", "open_store"),
    "before the groups were made": ("argonne.ranks.world", "connect"),
    "between the groups": ("torch.distributed", "new_group"),
    "while the model was built": ("argonne.training.build", "build_model"),
    "before the loop": ("argonne.training.state", "Run"),
}
BEFORE_ANYONE_LISTENS = {"before it reached the store"}
"""The other rank may still import torch when torchrun sends it SIGTERM."""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_killed_before_the_first_step_under_torchrun(
    tmp_path: Path, data: list[str], place: str, victim: int
) -> None:
    module, function = PLACES[place]
    fault = {"kind": "early", "rank": victim, "module": module, "function": function}
    flags = [*data, "--output-dir", tmp_path]
    finished = wait(start(2, *flags, fault=fault))
    assert finished.code == 1 and f"local_rank: {victim}" in finished.stderr  # torchrun's own report
    if place in BEFORE_ANYONE_LISTENS and not finished.errors():
        return
    line = the_error(finished)
    assert f"rank {victim}" in line and ("died" in line or " had joined" in line), line
    if (tmp_path / "stats" / "run_status.json").exists():
        assert status(tmp_path)["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_killed_before_the_first_step_is_started_again(
    tmp_path: Path, data: list[str], place: str
) -> None:
    module, function = PLACES[place]
    fault = {"kind": "early", "rank": 1, "module": module, "function": function}
    torchrun = ("--standalone", "--max-restarts=1")
    finished = wait(start(2, *data, "--output-dir", tmp_path, torchrun=torchrun, fault=fault))
    assert finished.code == 0, finished.stderr
    assert len(finished.errors()) == 1 or place in BEFORE_ANYONE_LISTENS
    stand = status(tmp_path)
    assert (stand["state"], stand["step"], stand["restart_count"]) == ("finished", STEPS, 1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_killed_before_the_first_step_without_torchrun(
    tmp_path: Path, data: list[str], place: str, victim: int
) -> None:
    """Nobody tells the other one: it notices by itself, within the time-out."""
    module, function = PLACES[place]
    fault = {"kind": "early", "rank": victim, "module": module, "function": function}
    port = free_port()
    flags = [*data, "--output-dir", tmp_path, "--stall-timeout", 8]
    ranks = [by_hand(rank, 2, port, *flags, fault=fault) for rank in (0, 1)]
    outcomes = [wait(process) for process in ranks]
    assert outcomes[victim].code == -signal.SIGKILL and outcomes[victim].errors() == []
    line = the_error(outcomes[1 - victim])
    assert f"rank {victim}" in line or "clients joined" in line or "could not connect" in line, line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "line"),
    [
        ("127.0.0.1", "fewer than --nnodes 2 nodes met at {} (--master) within 6 s (--join-timeout)"),
        ("192.0.2.1", "nothing answers at {} (--master) within 6 s (--join-timeout)"),  # nobody's address
    ],
)
def test_a_node_that_never_comes_is_one_line_of_the_launcher(
    tmp_path: Path, data: list[str], host: str, line: str
) -> None:
    endpoint = f"{host}:{free_port()}"
    options = ["--nnodes", "2", "--master", endpoint, "--nproc-per-node", "1", "--join-timeout", "6"]
    done = subprocess.run(
        ["bash", ROOT / "scripts/launch_multi_node.sh", *options, "--", *data, "--output-dir", tmp_path],
        env={**environment(), "ARGONNE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"error: {line.format(endpoint)}" in the_error(Finished(done.returncode, done.stdout, done.stderr))
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ranks_started_with_different_flags_are_refused(tmp_path: Path, data: list[str]) -> None:
    port = free_port()
    ranks = [
        by_hand(rank, 2, port, *data, "--output-dir", tmp_path, "--seed", seed)
        for rank, seed in enumerate((1, 2))
    ]
    outcomes = [wait(process) for process in ranks]
    assert [finished.code for finished in outcomes] == [2, 2]
    (line,) = [line for finished in outcomes for line in finished.errors()]
    assert "--seed differs between ranks: 1 on rank 0, 2 on rank 1" in line


@pytest.mark.slow
def test_a_busy_port_is_named(tmp_path: Path, data: list[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        finished = wait(by_hand(0, 2, port, *data, "--output-dir", tmp_path))
    assert f"cannot join the others at localhost:{port}" in the_error(finished)
