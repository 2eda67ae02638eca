"""Runs that the tests of this room share: pretended ones, and small whole ones."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from argonne.run.signals import STOP_SIGNALS
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, launch
from tests.run.pretended import WORKER, Start
from tests.run.whole_runs import INTERVAL, STEPS


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


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A run that ends inside this process leaves it deaf to signals, which later children would inherit."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=90, length=600)
    flags = ["--tokenizer-path", str(tokenizer), "--data-glob", glob, *SHAPE, *SCHEDULE]
    return [*flags, "--total-steps", str(STEPS), "--checkpoint-interval", str(INTERVAL)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """Two ranks, twelve steps, nothing wrong."""
    output = tmp_path_factory.mktemp("unbroken")
    assert launch(2, *data, "--output-dir", output).code == 0
    return output


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """One process, twelve steps, nothing wrong."""
    output = tmp_path_factory.mktemp("plain")
    assert launch(1, *data, "--output-dir", output).code == 0
    return output
