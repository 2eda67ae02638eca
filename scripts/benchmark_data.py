"""The token stream: against the bare tokenizer and `datasets`, over two ranks, and resumed anywhere."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from benchmark_common import ROUNDS, Report, Row, interleaved, summary, timed_row
from corpus import build_tokenizer, write_shards
from distributed import run_ranks
from quickstart_corpus import documents

from data_feed import StepFeed
from data_open import open_source
from data_source import SourceOptions
from data_tokenize import FastEncoder, load_tokenizer, plain_ids

VOCABULARY = 16384
SHARDS = 8
BLOCK_SIZE, SAMPLES = 512, 16
RESUMED_CACHE = "cache"
FEED_STEPS = 100


class Corpus:
    """The standard library's text in shards, its tokenizer, and how many steps one pass of it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts = documents()[::2]
        write_shards(folder / "data", self.texts, SHARDS, row_group_rows=64)
        self.tokenizer_path = str(build_tokenizer(folder / "tokenizer", VOCABULARY))
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        tokens = sum(len(plain_ids(self.tokenizer, text)) + 1 for text in self.texts)
        self.tokens = tokens
        self.steps = tokens // (BLOCK_SIZE * SAMPLES)

    def options(self, threads: int) -> SourceOptions:
        return SourceOptions(
            data_glob=str(self.folder / "data" / "*.parquet"),
            block_size=BLOCK_SIZE,
            samples_per_step=SAMPLES,
            num_proc=threads,
            cache_dir=self.folder / RESUMED_CACHE,
        )


def pipeline(corpus: Corpus, threads: int) -> float:
    """Seconds for one pass: parquet to samples, position and hash of each step."""
    source = open_source(corpus.options(threads), corpus.tokenizer).source
    start = time.perf_counter()
    for _ in range(corpus.steps):
        source.next_step()
    seconds = time.perf_counter() - start
    source.close()
    return seconds


def bare(corpus: Corpus, threads: int) -> float:
    """Seconds of ``encode_batch_fast`` on the same texts, in batches, nothing kept."""
    backend = corpus.tokenizer.backend_tokenizer
    batches = list(_batches(corpus.texts))

    def encode(batch: list[str]) -> int:
        return sum(len(encoding) for encoding in backend.encode_batch_fast(batch, add_special_tokens=False))

    start = time.perf_counter()
    if threads == 1:
        for batch in batches:
            encode(batch)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(encode, batches))
    return time.perf_counter() - start


def _batches(texts: list[str], characters: int = 1 << 18) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def datasets_stream(corpus: Corpus, skip: int = 0, limit: int | None = None) -> float:
    """Seconds of `datasets` streaming and tokenizing in batches, as its documentation has it."""
    import datasets

    start = time.perf_counter()
    files = str(corpus.folder / "data" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.skip(skip) if skip else rows
    rows = rows.map(
        lambda batch: {"input_ids": corpus.tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=["text", "id"],
    )
    for index, _ in enumerate(rows):
        if limit is not None and index + 1 == limit:
            break
    return time.perf_counter() - start


def first_batch(corpus: Corpus, share: float) -> float:
    """Seconds from opening the source at ``share`` of the corpus to its first step."""
    rows = len(corpus.texts)
    row = int(share * rows)
    shard = next(s for s in range(SHARDS) if row < rows * (s + 1) // SHARDS)
    saved = {
        "epoch": 0,
        "file_name": f"000_{shard:05d}.parquet",
        "current_file_idx": shard,
        "row": row - rows * shard // SHARDS,
        "token_offset": 0,
        "streaming": True,
    }
    start = time.perf_counter()
    source = open_source(corpus.options(1), corpus.tokenizer, saved_position=saved, global_step=1).source
    source.next_step()
    seconds = time.perf_counter() - start
    source.close()
    return seconds


def feed_rank(rank: int, world_size: int, options: SourceOptions, tokenizer: str, rounds: int) -> list[float]:
    """CPU seconds of this rank for FEED_STEPS steps of the feed, each round."""
    group = dist.new_group(backend="gloo") if world_size > 1 else None
    seconds = []
    for _ in range(rounds):
        source = open_source(options, load_tokenizer(tokenizer)).source if rank == 0 else None
        dist.barrier()
        start = time.process_time()
        with StepFeed(source, samples_per_step=SAMPLES, block_size=BLOCK_SIZE, group=group) as feed:
            for _ in range(FEED_STEPS):
                feed.next()
            seconds.append(time.process_time() - start)
            dist.barrier()
    return seconds


def cpu_of_ranks(corpus: Corpus, ranks: int, rounds: int) -> list[float]:
    """CPU seconds of all ranks together."""
    results = run_ranks(feed_rank, ranks, corpus.options(1), corpus.tokenizer_path, rounds, timeout=600)
    return [sum(values) for values in zip(*results, strict=True)]


def check_ids(corpus: Corpus) -> None:
    """The pipeline's encoder gives the ids of the plain call."""
    encoder = FastEncoder(corpus.tokenizer.backend_tokenizer, corpus.tokenizer.eos_token_id)
    ids, _ = encoder.encode(corpus.texts[:3], [False] * 3)
    assert ids.tolist() == [token for text in corpus.texts[:3] for token in plain_ids(corpus.tokenizer, text)]


def measure(corpus: Corpus, rounds: int) -> dict[str, list[float]]:
    """Seconds by variant."""
    rows = len(corpus.texts)
    passes: dict[str, Callable[[], float]] = {
        "pipeline 1": lambda: pipeline(corpus, 1),
        "bare 1": lambda: bare(corpus, 1),
        "pipeline 2": lambda: pipeline(corpus, 2),
        "bare 2": lambda: bare(corpus, 2),
        "datasets": lambda: datasets_stream(corpus),
    }
    places: dict[str, Callable[[], float]] = {
        "first batch at 0 %": lambda: first_batch(corpus, 0.0),
        "first batch at 99 %": lambda: first_batch(corpus, 0.99),
    }
    skips: dict[str, Callable[[], float]] = {
        "datasets at 0 %": lambda: datasets_stream(corpus, 0, 8),
        "datasets skip to 99 %": lambda: datasets_stream(corpus, int(0.99 * rows), 8),
    }
    measured = interleaved(passes, rounds) | interleaved(places, 3 * rounds)
    measured |= interleaved(skips, min(rounds, 3))
    for ranks in (1, 2):
        measured[f"cpu of {ranks}"] = cpu_of_ranks(corpus, ranks, rounds)
    return measured


def rows_of(m: dict[str, list[float]]) -> list[Row]:
    floor: dict[str, Any] = {"inverse": True, "at_least": True}
    return [
        timed_row("rate of the pipeline / encode_batch_fast, 1 thread", m["pipeline 1"], m["bare 1"],
                  target=0.95, **floor),
        timed_row("rate of the pipeline / encode_batch_fast, 2 threads", m["pipeline 2"], m["bare 2"],
                  target=0.90, **floor),
        timed_row("rate of the pipeline / datasets streaming, 1 thread", m["pipeline 1"], m["datasets"],
                  inverse=True),
        timed_row("CPU of the feed, 2 ranks / 1 rank", m["cpu of 2"], m["cpu of 1"], target=1.1),
        timed_row("first batch after a resume, at 99 % / at 0 %", m["first batch at 99 %"],
                  m["first batch at 0 %"], target=1.2),
        timed_row("datasets streaming with skip: first rows, at 99 % / at 0 %", m["datasets skip to 99 %"],
                  m["datasets at 0 %"]),
    ]  # fmt: skip


def run(rounds: int = ROUNDS) -> Report:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(folder))
        check_ids(corpus)
        measured = measure(corpus, rounds)
        tokens, texts = corpus.tokens, len(corpus.texts)
    return Report(
        name="data",
        title=f"The token stream: {texts:,} documents, {tokens / 1e6:.1f} million tokens",
        rows=tuple(rows_of(measured)),
        remarks=(
            f"Byte-level BPE of {VOCABULARY} ids with Qwen's splitting rule, on half the standard library. "
            "The bare tokenizer has its texts in memory and throws the ids away; the pipeline reads parquet, "
            "cuts samples, hashes them and keeps the place.",
            "On two threads the bare tokenizer runs one batch per thread, which is faster than its own "
            "parallelism over one batch.",
        ),
        data={variant: summary(values) for variant, values in measured.items()},
    )
