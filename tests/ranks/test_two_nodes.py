"""Two nodes for real: two torchrun agents that meet by rendezvous; the second has no data and no output."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, command, environment, launch, metrics
from tests import ROOT

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "two_nodes_on_one_machine.sh"
FLAGS = ["--total-steps", "40", "--warmup-steps", "5", "--checkpoint-interval", "15"]


@pytest.mark.parametrize("network", ["namespaces", "loopback"])
def test_two_nodes_train_like_one_process(tmp_path: Path, network: str) -> None:
    done = subprocess.run(
        [
            "bash",
            str(SCRIPT),
            "--network",
            network,
            "--work-dir",
            str(tmp_path),
            "--stop-step",
            "4",
            "--",
            *FLAGS,
        ],
        env={**os.environ, "ARGONNE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=270,
    )
    if "needs root and the ip command" in done.stderr:
        pytest.skip("no right to make network namespaces here")
    assert done.returncode == 0, done.stderr
    assert "The second node has: nothing\n" in done.stdout
    assert "Start: resuming from run/pretrained/" in done.stdout
    first = tmp_path / "two_nodes_1" / "first" / "run"
    status = json.loads((first / "stats" / "run_status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 40)
    lines = metrics(first)
    assert [line["step"] for line in lines] == list(range(1, 41))

    alone = tmp_path / "alone"
    finished = launch(
        1, "--model-config", "argonne-tiny", "--tokenizer-path", tmp_path / "corpus/tokenizer",
        "--data-glob", tmp_path / "corpus/data/*.parquet", "--batch-size", 16, "--block-size", 128,
        "--learning-rate", 4e-3, "--min-learning-rate", 2e-4, *FLAGS, "--output-dir", alone,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    for mine, theirs in zip(lines, metrics(alone), strict=True):
        assert mine["stream_hash"] == theirs["stream_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-4)


@pytest.fixture
def cable() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable; 10.78.0.1 and 10.78.0.2 are their addresses."""
    ends = (f"argl{os.getpid()}", f"argr{os.getpid()}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for end in ends:
            ip("netns", "add", end)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            ends[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            ends[1],
        )
        for number, end in enumerate(ends, 1):
            ip("-n", end, "addr", "add", f"10.78.0.{number}/24", "dev", "cable")
            ip("-n", end, "link", "set", "cable", "up")
            ip("-n", end, "link", "set", "lo", "up")
        subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True)
        yield ends
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to make network namespaces here: {error}")
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "del", end], capture_output=True)


@pytest.mark.parametrize("fault", ["killed", "no network"])
def test_a_node_that_is_gone_is_named_by_the_other(
    tmp_path: Path, cable: tuple[str, str], fault: str
) -> None:
    """One rank a host. Nothing tells gloo that a host has no network: it would wait for half an hour."""
    shards, tokenizer, _ = small_corpus(tmp_path / "corpus")
    flags = [
        *SHAPE, *SCHEDULE, "--tokenizer-path", tokenizer, "--data-glob", shards, "--total-steps", 100000,
        "--checkpoint-interval", 100000, "--sample-interval", 0, "--output-dir", tmp_path / "run",
    ]  # fmt: skip
    ranks = []
    for rank, (end, host) in enumerate(zip(cable, ("first", "second"), strict=True)):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        meeting = {"MASTER_ADDR": "10.78.0.1", "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "cable"}
        on_host = [
            "ip",
            "netns",
            "exec",
            end,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {host}; exec "$@"',
            "sh",
        ]
        ranks.append(
            subprocess.Popen(
                [*on_host, *command(1, *flags)], env={**environment(), **place, **meeting},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        lines = tmp_path / "run" / "stats" / "training_metrics.jsonl"
        while not lines.exists() or lines.read_text().count("\n") < 3:
            assert [rank.poll() for rank in ranks] == [None, None]
            time.sleep(0.1)
        if fault == "killed":
            ranks[1].kill()
        else:
            subprocess.run(["ip", "-n", cable[1], "link", "set", "cable", "down"], check=True)
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = [[line for line in text.splitlines() if line.startswith("error: ")] for text in errors]
    assert len(said[0]) == 1 and said[0][0].startswith("error: host second is gone, with rank 1, after step")
    assert ranks[0].returncode == 1
    if fault == "no network":  # to rank 1 it is rank 0's host that is gone
        assert len(said[1]) == 1 and said[1][0].startswith("error: rank 0 on host first is gone")
        assert ranks[1].returncode == 1
