"""Two nodes of two ranks, as torchrun starts them: hsdp trains, saves and resumes like any other layout."""

import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, Finished, checkpoint, launch, metrics, start, wait
from tests.test_end_to_end import tensors

pytestmark = pytest.mark.slow
ONE = ["--global-batch-size", 4, "--batch-size", 1]
EVERY_CHECK = ["--verify-sharding", "--replica-check-interval", 1, "--async-checkpoint", "on"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=90, length=600)
    return ["--tokenizer-path", str(tokenizer), "--data-glob", glob]


def two_nodes(*flags: Any) -> Finished:
    """Two launchers, each of two processes; what the first node's rank 0 said."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    nodes = [
        start(
            2,
            *flags,
            torchrun=(
                "--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
            ),
        )
        for node in range(2)
    ]  # fmt: skip
    first, second = (wait(node, timeout=400) for node in nodes)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    return first


def flags(data: list[str], output: Path, *more: Any) -> list[Any]:
    saving = ["--checkpoint-interval", 3, "--total-steps", 6, "--sample-interval", 3]
    return [*data, *SHAPE, *SCHEDULE, *ONE, *saving, "--output-dir", output, *more]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """Six steps of one process, saved at 3 and 6."""
    output = tmp_path_factory.mktemp("alone")
    finished = launch(1, *flags(data, output))
    assert finished.code == 0, finished.stderr
    return output


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    output = tmp_path_factory.mktemp("hybrid")
    asked = ["--tensor-parallel-size", 1, "--data-parallel", "hsdp", *EVERY_CHECK]
    said = two_nodes(*flags(data, output, *asked)).stdout
    assert re.search(r"^Replicas: .*\(hsdp\)$", said, re.MULTILINE)
    assert "Verified the split: " in said
    return output


def assert_alike(output: Path, alone: Path, steps: int) -> None:
    for mine, theirs in zip(metrics(output)[-steps:], metrics(alone)[-steps:], strict=True):
        assert (mine["step"], mine["stream_hash"]) == (theirs["step"], theirs["stream_hash"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-4)


def from_three(output: Path, source: Path) -> Path:
    (output / "pretrained").mkdir(parents=True)
    shutil.copy(checkpoint(source, 3), output / "pretrained")
    return output


def test_hsdp_trains_like_one_process(alone: Path, hybrid: Path) -> None:
    assert_alike(hybrid, alone, 6)
    assert checkpoint(hybrid, 3).stat().st_size == pytest.approx(
        checkpoint(alone, 3).stat().st_size, abs=4096
    )


@pytest.mark.parametrize("kind", ["fsdp", "ddp", "one process"])
def test_what_hsdp_saved_resumes_anywhere(
    kind: str, tmp_path: Path, data: list[str], alone: Path, hybrid: Path
) -> None:
    output = from_three(tmp_path / "run", hybrid)
    if kind == "one process":
        finished = launch(1, *flags(data, output))
    else:
        asked = ["--tensor-parallel-size", 1, "--data-parallel", kind]
        finished = launch(4, *flags(data, output, *asked))
    assert finished.code == 0, finished.stderr
    assert_alike(output, alone, 3)


def test_hsdp_resumes_what_one_process_saved(
    tmp_path: Path, data: list[str], alone: Path, hybrid: Path
) -> None:
    for number, source in enumerate((alone, hybrid)):
        output = from_three(tmp_path / str(number), source)
        asked = ["--tensor-parallel-size", 1, "--data-parallel", "hsdp", "--reshard-after-forward", "off"]
        said = two_nodes(*flags(data, output, *asked)).stdout
        assert "Gathered weights: kept until the backward pass" in said
        assert_alike(output, alone, 3)
    # The same layout again, gathered weights kept: not a bit is another.
    again, straight = tensors(checkpoint(output, 6)), tensors(checkpoint(hybrid, 6))
    assert again.keys() == straight.keys()
    assert all((again[name] == tensor).all() for name, tensor in straight.items())


def test_tensor_parallelism_over_a_whole_node_is_refused(tmp_path: Path, data: list[str]) -> None:
    finished = launch(
        2, "--plan", "--data-parallel", "hsdp", "--plan-world-size", 16, "--output-dir", tmp_path
    )
    assert finished.code != 0
    assert any(line.startswith("error: --data-parallel hsdp shares") for line in finished.errors())
