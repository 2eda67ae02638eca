"""Runs with --eval-data: what they record, on which steps, and that they train as without it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.files import OutputFolder
from argonne.testing.corpus import short_texts, small_corpus, write_shards
from argonne.testing.launch import SCHEDULE, SHAPE, checkpoint, launch, metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    glob, tokenizer, _ = small_corpus(folder, documents=90, length=600)
    write_shards(folder / "code", short_texts(8, 500, skip=120), shards=1)
    write_shards(folder / "help", short_texts(8, 500, skip=140), shards=1)
    flags = ["--tokenizer-path", str(tokenizer), "--data-glob", glob, "--total-steps", "10"]
    return [*flags, *SHAPE, *SCHEDULE, "--checkpoint-interval", "6"]


def eval_flags(data: list[str]) -> list[str]:
    folder = Path(data[3]).parent.parent
    sets = [f"code={folder}/code/*.parquet", f"help={folder}/help"]
    return ["--eval-data", *sets, "--eval-interval", "4", "--eval-samples", "5"]


def eval_lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in OutputFolder(output).eval_metrics.read_text().splitlines()]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("validated")
    finished = launch(2, *data, *eval_flags(data), "--output-dir", output)
    assert finished.code == 0, finished.stderr
    return output, finished.stdout


def test_lines_at_the_interval_and_at_the_end(validated: tuple[Path, str]) -> None:
    output, stdout = validated
    lines = eval_lines(output)
    assert [(line["step"], line["name"]) for line in lines] == [
        (step, name) for step in (4, 8, 10) for name in ("code", "help")
    ]
    for line in lines:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert (line["samples"], line["tokens"]) == (5, 5 * 64) and line["seconds"] > 0
        assert 0 < line["bits_per_byte"] < line["loss"] / math.log(2)
    assert lines[4]["loss"] < lines[0]["loss"]
    assert "Validation code at step 8 | Loss: " in stdout


def test_training_is_the_same_without(tmp_path: Path, validated: tuple[Path, str], data: list[str]) -> None:
    finished = launch(2, *data, "--output-dir", tmp_path)
    assert finished.code == 0, finished.stderr
    kept = ("loss", "grad_norm", "lr", "stream_hash")
    for mine, theirs in zip(metrics(tmp_path), metrics(validated[0]), strict=True):
        assert [mine[key] for key in kept] == [theirs[key] for key in kept]
    weights = [
        torch.load(checkpoint(output, 10), weights_only=True)["model_state_dict"]
        for output in (tmp_path, validated[0])
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not OutputFolder(tmp_path).eval_metrics.exists()


@pytest.mark.slow
def test_a_resume_replaces_the_lines_beyond_at_any_layout(
    tmp_path: Path, validated: tuple[Path, str], data: list[str]
) -> None:
    for name in ("pretrained", "stats"):
        (tmp_path / name).mkdir()
    shutil.copy(checkpoint(validated[0], 6), tmp_path / "pretrained")
    copied = OutputFolder(tmp_path).eval_metrics
    shutil.copy(OutputFolder(validated[0]).eval_metrics, copied)
    finished = launch(1, *data, *eval_flags(data), "--output-dir", tmp_path)
    assert finished.code == 0, finished.stderr
    for mine, theirs in zip(eval_lines(tmp_path), eval_lines(validated[0]), strict=True):
        assert (mine["step"], mine["name"]) == (theirs["step"], theirs["name"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
    first, *rest = copied.read_text().splitlines(keepends=True)
    copied.write_text(first + rest[0])  # as after a stop at the last step, which leaves its validation out
    assert launch(1, *data, *eval_flags(data), "--output-dir", tmp_path).code == 0
    assert [line["step"] for line in eval_lines(tmp_path)] == [4, 4, 10, 10]


@pytest.mark.slow
def test_a_missing_set_ends_the_run_before_its_first_step(tmp_path: Path, data: list[str]) -> None:
    finished = launch(2, *data, "--eval-data", "web=/nowhere/*.parquet", "--output-dir", tmp_path)
    assert finished.code == 1 and len(finished.errors()) == 1
    assert finished.errors()[0].startswith("error: --eval-data web: no shard matches '/nowhere/*.parquet'")
    assert not OutputFolder(tmp_path).metrics.exists()
