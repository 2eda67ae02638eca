"""A finished run with its corpus, for the tools that read what a run has left."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, checkpoint, launch

LAST_STEP, INTERVAL = 9, 3


@dataclass(frozen=True)
class FinishedRun:
    """Nine steps of two sequences, a checkpoint after every third, validated with each."""

    folder: Path
    tokenizer: Path
    texts: list[str]
    """Of the corpus in stream order: 20 in each of three shards."""


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("finished")
    glob, tokenizer, texts = small_corpus(root / "corpus")
    flags = [*SHAPE, *SCHEDULE, "--tokenizer-path", tokenizer, "--data-glob", glob]
    flags += ["--total-steps", LAST_STEP, "--lr-schedule", "wsd", "--cooldown-steps", 2]
    flags += ["--checkpoint-interval", INTERVAL, "--keep-checkpoints", 9, "--output-dir", root / "run"]
    flags += ["--eval-data", f"held={root}/corpus/data", "--eval-samples", 2, "--eval-interval", INTERVAL]
    for _ in range(6):  # a save is postponed where the machine is still busy verifying the one before
        shutil.rmtree(root / "run", ignore_errors=True)
        done = launch(1, *flags)
        assert done.code == 0, done.stderr
        if all(checkpoint(root / "run", step).is_file() for step in range(INTERVAL, LAST_STEP + 1, INTERVAL)):
            break
    return FinishedRun(folder=root / "run", tokenizer=tokenizer, texts=texts)
