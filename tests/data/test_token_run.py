"""Whole runs with document attention and with sources of token ids."""

from pathlib import Path
from typing import Any

import pytest
from prepare_data import main as prepare

import argonne.testing.corpus as corpus
from argonne.testing.launch import SHAPE, launch, metrics
from tests.data.remote_server import serving


def run(processes: int, tmp_path: Path, name: str, *flags: Any, steps: int = 4) -> list[dict[str, Any]]:
    finished = launch(
        processes, "--tokenizer-path", tmp_path / "tokenizer", *SHAPE, "--output-dir", tmp_path / name,
        "--total-steps", steps, *flags,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    return metrics(tmp_path / name)


@pytest.fixture
def corpus_in(tmp_path: Path) -> Path:
    corpus.write_shards(tmp_path / "data", corpus.short_texts(60, 150))
    corpus.build_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def assert_same_losses(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for line, wanted in zip(lines, expected, strict=True):
        assert line["stream_hash"] == wanted["stream_hash"]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=3e-5)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=3e-4)


@pytest.mark.slow
def test_document_attention_is_the_same_in_every_layout(corpus_in: Path) -> None:
    data = ["--data-glob", corpus_in / "data", "--document-attention", "--global-batch-size", 4]
    one = run(1, corpus_in, "one", *data, "--verify-sharding")
    plain = run(1, corpus_in, "plain", *data[:2], *data[3:])
    assert one[0]["stream_hash"] == plain[0]["stream_hash"]
    assert abs(one[0]["loss"] - plain[0]["loss"]) > 1e-5
    assert_same_losses(run(2, corpus_in, "split", *data, "--sequence-parallel"), one)
    replicas = run(2, corpus_in, "replicas", *data, "--tensor-parallel-size", 1)
    assert_same_losses(replicas, one)


@pytest.mark.slow
def test_tokens_over_http_train_like_their_text(corpus_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat files made from the text, fetched in ranges; the run is resumed half way."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    arguments = [str(corpus_in / "data"), "--tokenize", str(corpus_in / "tokenizer")]
    assert prepare([*arguments, "--token-format", "bin", "--output-dir", str(corpus_in / "bin")]) == 0
    text = run(1, corpus_in, "text", "--data-glob", corpus_in / "data")
    with serving(corpus_in) as (url, _):
        flags = ["--data-glob", f"{url}/bin/*.bin", "--data-cache-dir", corpus_in / "cache"]
        run(1, corpus_in, "tokens", *flags, "--checkpoint-interval", 2, steps=2)
        tokens = run(1, corpus_in, "tokens", *flags)
    assert [line["stream_hash"] for line in tokens] == [line["stream_hash"] for line in text]
    assert list((corpus_in / "cache" / "remote").glob("*/data"))


@pytest.mark.slow
def test_a_mixture_of_text_and_tokens_is_masked_in_every_layout(corpus_in: Path) -> None:
    """By sources, with the loss in chunks and whole, and resumed half way."""
    arguments = [str(corpus_in / "data"), "--tokenize", str(corpus_in / "tokenizer")]
    assert prepare([*arguments, "--token-format", "bin", "--output-dir", str(corpus_in / "bin")]) == 0
    sources = [f"web=0.6:{corpus_in}/data/*", f"books=0.4:{corpus_in}/bin/*.bin"]
    data = ["--data-mix", *sources, "--global-batch-size", 4]
    masked = [*data, "--document-attention"]
    one = run(1, corpus_in, "one", *masked, "--loss-chunk-tokens", 0)
    plain = run(1, corpus_in, "plain", *data)
    assert one[0]["stream_hash"] == plain[0]["stream_hash"]
    assert abs(one[0]["loss"] - plain[0]["loss"]) > 1e-5
    chunked = [*masked, "--loss-chunk-tokens", 8]
    run(2, corpus_in, "split", *chunked, "--sequence-parallel", "--checkpoint-interval", 2, steps=2)
    split = run(2, corpus_in, "split", *chunked, "--sequence-parallel")
    assert_same_losses(split, one)
    for line, wanted in zip(split, one, strict=True):
        assert line["loss_by_source"] == pytest.approx(wanted["loss_by_source"], rel=3e-5)
