"""A whole run on a mixture: resumed in another layout, its weights changed; what it prints and keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch

import argonne.testing.corpus as corpus
from argonne.testing.launch import SCHEDULE, checkpoint, launch, metrics
from tests.data.mixture_samples import write_sources
from tests.data.naive import mixture_order

WEIGHTS = {"web": "0.62", "code": "0.3", "books": "0.08"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_sources(folder)
    corpus.build_tokenizer(folder / "tokenizer")
    return folder


def mix(corpora: Path, weights: dict[str, str]) -> list[str]:
    return [f"{name}={weight}:{corpora / name}/*.parquet" for name, weight in weights.items()]


def flags(corpora: Path, output: Path, weights: dict[str, str], *more: Any) -> list[Any]:
    shape = ["--model-config", "argonne-tiny", "--block-size", 32, "--global-batch-size", 4, *SCHEDULE]
    data = ["--tokenizer-path", corpora / "tokenizer", "--data-mix", *mix(corpora, weights), "--shuffle"]
    return [*shape, *data, "--checkpoint-interval", 3, "--log-interval", 1, "--output-dir", output, *more]


@pytest.mark.slow
def test_a_mixture_in_other_layouts(corpora: Path, tmp_path: Path) -> None:
    """One process and four sequences at once, or two replicas resumed by two slices: the same run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = launch(1, *flags(corpora, whole, WEIGHTS, "--total-steps", 6, "--batch-size", 4))
    assert done.code == 0, done.stderr
    replicas = ["--batch-size", 1, "--tensor-parallel-size", 1, "--total-steps", 6]
    first = launch(2, *flags(corpora, parts, WEIGHTS, *replicas))
    assert first.code == 0, first.stderr
    middle = ["--total-steps", 6, "--batch-size", 2, "--checkpoint-path", checkpoint(parts, 3)]
    then = launch(2, *flags(corpora, parts, WEIGHTS, *middle))
    assert then.code == 0 and "Step 4 |" in then.stdout and "Step 3 |" not in then.stdout, then.stderr
    for one, other in zip(metrics(whole), metrics(parts), strict=True):
        for key in ("step", "stream_hash", "data_position", "samples_by_source", "tokens_by_source"):
            assert one[key] == other[key], key
        assert one["loss_by_source"] == pytest.approx(other["loss_by_source"], rel=1e-4)
        assert sum(one["samples_by_source"].values()) == 4 * one["step"]
    order = mixture_order(list(WEIGHTS.values()), 24)
    last = metrics(whole)[-1]
    assert list(last["samples_by_source"].values()) == [order.count(number) for number in range(3)]
    assert "Source: web | Loss: " in done.stdout and "Source books: weight 0.08, 3 shards" in done.stdout
    saved = torch.load(checkpoint(parts, 6), weights_only=True)
    assert saved["data_position"]["mixture"] == {"weights": WEIGHTS, "n": 24}
    assert list(saved["data_position"]["sources"]) == list(WEIGHTS)

    changed = {"web": "1", "math": "1"}
    more = launch(1, *flags(corpora, whole, changed, "--total-steps", 8, "--batch-size", 4))
    assert more.code == 0, more.stderr
    (line,) = [line for line in more.stderr.splitlines() if "the mixture was" in line]
    assert "was web=0.62 code=0.3 books=0.08, is web=1 math=1" in line and "math from the start" in line
    final = metrics(whole)[-1]
    assert final["samples_by_source"]["web"] == last["samples_by_source"]["web"] + 4
    assert final["samples_by_source"]["math"] == 4
    assert final["samples_by_source"]["code"] == last["samples_by_source"]["code"]
    assert torch.load(checkpoint(whole, 8), weights_only=True)["data_position"]["mixture"]["n"] == 8


def test_one_line_for_a_source_that_is_gone(corpora: Path, tmp_path: Path) -> None:
    gone = {"web": "1", "nothing": "1"}
    done = launch(1, *flags(corpora, tmp_path, gone, "--total-steps", 9, "--batch-size", 4))
    assert done.code == 1
    (error,) = done.errors()
    assert "source 'nothing': no shard matches" in error and "(--data-mix)" in error
