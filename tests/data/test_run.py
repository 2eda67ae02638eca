"""A whole run and its data: stopped while it tokenizes the corpus, what it skipped, what it waited."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import argonne.testing.corpus as corpus
from argonne.data.tokenizer import load_tokenizer
from argonne.testing.launch import SHAPE, checkpoint, launch, metrics, start, status, wait
from argonne.testing.sources import source_options
from data_stream import open_stream


def long_corpus(folder: Path, copies: int) -> None:
    """``copies`` shards of the standard library each; tokenizing one takes seconds."""
    folder.mkdir()
    table = pa.table({"text": list(corpus.standard_library_texts())})
    for index in range(copies):
        pq.write_table(table, folder / f"{index}.parquet", row_group_size=20)


@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_was_skipped_is_recorded_everywhere(tmp_path: Path, streaming: bool) -> None:
    paths = corpus.write_shards(tmp_path / "data", corpus.short_texts(30, 100), row_group_rows=5)
    table = pq.read_table(paths[0])
    pq.write_table(table, paths[0], row_group_size=5, compression="none", write_page_checksum=True)
    content = bytearray(paths[0].read_bytes())
    content[content.index(table["text"][7].as_py()[:20].encode())] ^= 1
    paths[0].write_bytes(content)
    flags: list[Any] = ["--tokenizer-path", corpus.build_tokenizer(tmp_path / "tokenizer"), *SHAPE]
    flags += ["--data-glob", tmp_path / "data", "--output-dir", tmp_path / "out", "--total-steps", 6]
    flags += [] if streaming else ["--no-streaming"]
    refused = launch(1, *flags)
    assert refused.code == 1
    assert len(refused.errors()) == 1 and "000_00000.parquet, row group 1: " in refused.errors()[0]

    finished = launch(1, *flags, "--skip-bad-shards")
    assert finished.code == 0, finished.stderr
    assert len([line for line in finished.stderr.splitlines() if "000_00000.parquet" in line]) == 1
    place = {"epoch": 0, "file_name": "000_00000.parquet", "row_group": 1, "row": 5, "rows": 5}
    saved = torch.load(checkpoint(tmp_path / "out", 6), weights_only=True)["data_state"]["skipped"]
    assert [skip.items() >= place.items() for skip in saved] == [True]
    (final,) = (tmp_path / "out" / "stats").glob("final_*.json")
    stats = json.loads(final.read_text())
    assert stats["data_skipped"] == saved and stats["null_rows"] == 0 and stats["documents"] > 5
    lines = metrics(tmp_path / "out")
    assert [line["data_skipped"] for line in lines if "data_skipped" in line] == [saved]
    assert lines[-1]["skipped_row_groups"] == 1


def wait_for(path: Path, pattern: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {path}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_the_corpus_is_tokenized_acts_at_once(tmp_path: Path, processes: int) -> None:
    """Longer than --stall-timeout, stopped within seconds, and the next run goes on with what is there."""
    long_corpus(tmp_path / "data", 4)
    tokenizer = corpus.build_tokenizer(tmp_path / "tokenizer")
    flags: list[Any] = ["--tokenizer-path", tokenizer, "--data-glob", tmp_path / "data", *SHAPE]
    flags += ["--no-streaming", "--num-proc", 1, "--total-steps", 3, "--seed", 5]
    flags += ["--output-dir", tmp_path / "out"]
    process = start(processes, *flags, "--stall-timeout", 3)
    wait_for(tmp_path / "out" / "cache", "tokens-*/journal.json")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stopped = wait(process)
    assert time.monotonic() - began < 5
    assert stopped.errors() == [] and status(tmp_path / "out")["state"] == "stopped"
    if processes == 1:
        assert stopped.code == 128 + signal.SIGTERM  # nothing was saved before the first step
    (folder,) = (tmp_path / "out" / "cache").glob("tokens-*")
    vouched = json.loads((folder / "journal.json").read_text())["tokens"]
    assert vouched > 100_000
    os.truncate(folder / "tokens.bin", 4 * vouched)
    inode, first = (folder / "tokens.bin").stat().st_ino, np.fromfile(folder / "tokens.bin", np.int32, 1000)

    finished = launch(processes, *flags)
    assert finished.code == 0, finished.stderr
    assert (folder / "tokens.bin").stat().st_ino == inode  # gone on with
    assert np.array_equal(np.fromfile(folder / "tokens.bin", np.int32, 1000), first)
    options = source_options(
        str(tmp_path / "data"),
        block_size=64,
        samples_per_step=2,
        streaming=False,
        seed=5,
        num_proc=1,
        cache_dir=tmp_path / "cache of its own",
    )
    source = open_stream(options, load_tokenizer(str(tokenizer))).source
    lines = metrics(tmp_path / "out")
    assert [source.next_step().progress.stream_hash for _ in lines] == [line["stream_hash"] for line in lines]


@pytest.mark.slow
def test_a_step_hardly_waits_for_its_tokens(tmp_path: Path) -> None:
    """Tokenizing is far faster than this model; the first texts were tokenized while it was built."""
    long_corpus(tmp_path / "data", 1)
    flags: list[Any] = ["--tokenizer-path", corpus.build_tokenizer(tmp_path / "tokenizer")]
    flags += ["--data-glob", tmp_path / "data", "--output-dir", tmp_path / "out", "--total-steps", 60]
    flags += ["--model-config", "argonne-tiny", "--batch-size", 4, "--block-size", 256, "--num-proc", 1]
    assert launch(1, *flags).code == 0
    lines = metrics(tmp_path / "out")
    assert lines[0]["data_wait_seconds"] < 0.1
    waited = sum(line["data_wait_seconds"] for line in lines)
    assert waited < 0.01 * sum(line["step_seconds"] for line in lines)
