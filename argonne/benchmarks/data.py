"""The token stream: against the bare tokenizer and `datasets`, over two ranks, and resumed anywhere."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from argonne.benchmarks.common import ROUNDS, Report, Row, interleaved, summary, timed_row
from argonne.benchmarks.data_corpus import (
    BLOCK_SIZE,
    SAMPLES,
    VOCABULARY,
    Corpus,
    check_ids,
    count_tokens,
)
from argonne.benchmarks.data_mixture import (
    datasets_interleaved,
    mixed,
    mixed_shuffled_masked,
    opened_late,
    shuffled,
    tokens_encoded,
)
from argonne.data.encoder_pool import EncoderPool
from argonne.data.feed import StepFeed
from argonne.data.source import SourceOptions
from argonne.data.stream import encoded_documents
from argonne.data.tokenizer import EncoderRecipe, load_tokenizer
from argonne.errors import DataError
from argonne.testing.distributed import run_ranks
from data_stream import open_stream

PASSES = 2
"""Passes through the corpus in a timed turn: what is read ahead at its end weighs less."""
FIRST_TOKENS = 300_000
"""Tokens before the clock starts: the first batches are small, and the read-ahead fills."""
FEED_STEPS = 80
QUIET_SECONDS = 0.3

Turns = dict[str, list[float]]


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this thread and those that it starts on ``count`` CPUs."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everywhere)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


class Clock:
    """Wall and CPU seconds of this process and the main thread's children, from the making on."""

    def __init__(self) -> None:
        self._cpu = self._cpu_now()
        self._wall = time.perf_counter()

    def _cpu_now(self) -> float:
        seconds = time.process_time()
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split():
            fields = Path(f"/proc/{child}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return seconds

    def stop(self) -> tuple[float, float]:
        """(wall seconds, CPU seconds)."""
        wall = time.perf_counter() - self._wall
        return wall, self._cpu_now() - self._cpu


def pipeline(
    corpus: Corpus, threads: int, options_of: Callable[[Corpus, int], SourceOptions] = Corpus.options
) -> tuple[float, float]:
    """A pass in mid-stream, parquet to samples, with position and hash of each step: wall and CPU seconds."""
    with on_cores(threads):
        source: Any = open_stream(options_of(corpus, threads), corpus.tokenizer).source
        _steps_until_a_batch_comes(source, FIRST_TOKENS)
        clock, before = Clock(), tokens_encoded(source)
        _steps_until_a_batch_comes(source, before + PASSES * corpus.tokens)
        wall, cpu = clock.stop()
        passes = (tokens_encoded(source) - before) / corpus.tokens
        source.close()
    return wall / passes, cpu / passes


def _steps_until_a_batch_comes(source: Any, tokens: int) -> None:
    """Up to the step that gets the first batch beyond ``tokens``: so the clock counts whole batches."""
    while tokens_encoded(source) < tokens:
        source.next_step()


def bare(corpus: Corpus, threads: int) -> tuple[float, float]:
    """A pass of ``encode_batch_fast`` over the same batches, nothing kept: wall and CPU seconds."""
    backend = corpus.tokenizer.backend_tokenizer
    batches = corpus.batches * PASSES
    with on_cores(threads):
        clock = Clock()
        if threads == 1:
            for batch in batches:
                count_tokens(backend, batch)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda batch: count_tokens(backend, batch), batches))
        wall, cpu = clock.stop()
    return wall / PASSES, cpu / PASSES


def by_processes(corpus: Corpus, processes: int) -> tuple[float, float]:
    """A pass of reading and tokenizing by so many processes, as from --num-proc 4 on: wall, CPU seconds."""
    pool = EncoderPool(EncoderRecipe(tokenizer=corpus.tokenizer), processes, processes=True)
    try:
        for ready in [pool.submit(["a text"], [True]) for _ in range(4 * processes)]:
            ready.result()
        clock = Clock()
        tokens = sum(len(batch.ids) for batch in encoded_documents(iter(corpus.reader()), pool))
        wall, cpu = clock.stop()
    finally:
        pool.close()
    if tokens != corpus.tokens:
        raise DataError(f"{processes} tokenizing processes gave {tokens} tokens, not {corpus.tokens}")
    return wall, cpu


def datasets_stream(corpus: Corpus, skip: int = 0, limit: int | None = None, batch_size: int = 1000) -> float:
    """Seconds of `datasets` streaming and tokenizing in batches (of its default size)."""
    import datasets

    start = time.perf_counter()
    files = str(corpus.folder / "data" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.skip(skip) if skip else rows
    rows = rows.map(
        lambda batch: {"input_ids": corpus.tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        batch_size=batch_size,
        remove_columns=["text", "id"],
    )
    for index, _ in enumerate(rows):
        if limit is not None and index + 1 == limit:
            break
    return time.perf_counter() - start


def datasets_pass(corpus: Corpus) -> tuple[float, float]:
    """A pass of `datasets` streaming on one core: wall and CPU seconds."""
    with on_cores(1):
        clock = Clock()
        datasets_stream(corpus)
        return clock.stop()


def first_batch(corpus: Corpus, share: float) -> float:
    """Seconds from opening the source at ``share`` of the corpus to its first step."""
    row, index = int(share * corpus.rows), 0
    while row >= corpus.shards[index].rows:
        row, index = row - corpus.shards[index].rows, index + 1
    saved = {
        "epoch": 0,
        "file_name": corpus.shards[index].name,
        "current_file_idx": index,
        "row": row,
        "token_offset": 0,
        "streaming": True,
    }
    start = time.perf_counter()
    source = open_stream(corpus.options(1), corpus.tokenizer, saved_position=saved, global_step=1).source
    source.next_step()
    seconds = time.perf_counter() - start
    source.close()
    return seconds


def feed_cpu(source: Any, group: dist.ProcessGroup | None) -> float:
    """CPU seconds of this rank for FEED_STEPS steps of the feed and all that it prepares beyond them.

    Only when everything that is read ahead is there is the work the same each time.
    """
    start = time.process_time()
    with StepFeed(source, samples_per_step=SAMPLES, block_size=BLOCK_SIZE, group=group) as feed:
        for _ in range(FEED_STEPS):
            feed.next()
        spent, before = time.process_time() - start, -1.0
        while source is not None and spent > before + 0.1 * QUIET_SECONDS:
            time.sleep(QUIET_SECONDS)
            spent, before = time.process_time() - start, spent
        if group is not None:
            dist.barrier()
    return spent


def feed_rank(
    rank: int, world_size: int, options: SourceOptions, tokenizer: str, rounds: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of this rank, each round: with the feed to itself (rank 0 only), and shared by all."""
    group = dist.new_group(backend="gloo")
    loaded = load_tokenizer(tokenizer) if rank == 0 else None
    alone, shared = [], []
    for _ in range(rounds + 1):
        alone.append(feed_cpu(open_stream(options, loaded).source, None) if rank == 0 else 0.0)
        dist.barrier()
        shared.append(feed_cpu(open_stream(options, loaded).source if rank == 0 else None, group))
    return alone[1:], shared[1:]


def cpu_of_ranks(corpus: Corpus, rounds: int) -> Turns:
    """CPU seconds of one rank, and of two together."""
    ranks = run_ranks(feed_rank, 2, corpus.options(1), corpus.tokenizer_path, rounds, timeout=1800)
    (alone, shared), (_, other) = ranks
    return {
        "cpu of 1": alone,
        "cpu of 2": [sum(values) for values in zip(shared, other, strict=True)],
        "cpu of rank 0 of 2": shared,
        "cpu of rank 1 of 2": other,
    }


def timed(variants: dict[str, Callable[[], tuple[float, float]]], rounds: int, warm_up: int = 1) -> Turns:
    """Wall seconds by variant, and its CPU seconds as "... (CPU)"."""
    cpu: Turns = defaultdict(list)

    def wall(name: str) -> float:
        seconds, spent = variants[name]()
        cpu[f"{name} (CPU)"].append(spent)
        return seconds

    measured = interleaved({name: functools.partial(wall, name) for name in variants}, rounds, warm_up)
    return measured | {name: values[warm_up:] for name, values in cpu.items()}


def measure(corpus: Corpus, rounds: int) -> Turns:
    """Seconds by variant."""
    measured = timed(
        {
            "pipeline 1": lambda: pipeline(corpus, 1),
            "bare 1": lambda: bare(corpus, 1),
            "pipeline 2": lambda: pipeline(corpus, 2),
            "bare 2": lambda: bare(corpus, 2),
            "datasets": lambda: datasets_pass(corpus),
            "mixture 2": lambda: pipeline(corpus, 2, mixed),
            "shuffled 2": lambda: pipeline(corpus, 2, shuffled),
            "masked 2": lambda: pipeline(corpus, 2, mixed_shuffled_masked),
        },
        rounds,
    )
    measured |= timed(
        {"processes 1": lambda: by_processes(corpus, 1), "processes 2": lambda: by_processes(corpus, 2)},
        rounds,
    )
    places: dict[str, Callable[[], float]] = {
        "first batch at 0 %": lambda: first_batch(corpus, 0.0),
        "first batch at 99 %": lambda: first_batch(corpus, 0.99),
        "mixture at 0 %": lambda: opened_late(corpus, mixed(corpus, 1), 0.0),
        "mixture at 99 %": lambda: opened_late(corpus, mixed(corpus, 1), 0.99),
        "shuffled at 0 %": lambda: opened_late(corpus, shuffled(corpus, 1), 0.0),
        "shuffled at 99 %": lambda: opened_late(corpus, shuffled(corpus, 1), 0.99),
    }
    others: dict[str, Callable[[], float]] = {
        "mixture 2 beside datasets": lambda: pipeline(corpus, 2, mixed)[0],
        "datasets interleaved": lambda: datasets_interleaved(corpus),
        "datasets at 0 %": lambda: datasets_stream(corpus, 0, 8, batch_size=8),
        "datasets skip to 99 %": lambda: datasets_stream(corpus, int(0.99 * corpus.rows), 8, batch_size=8),
    }
    measured |= interleaved(places, 3 * rounds) | interleaved(others, min(rounds, 3))
    return measured | cpu_of_ranks(corpus, rounds)


def rows_of(m: Turns) -> list[Row]:
    rate: dict[str, Any] = {"inverse": True}
    floor: dict[str, Any] = {"inverse": True, "at_least": True}
    return [
        timed_row("rate of the pipeline / encode_batch_fast, 1 thread on 1 core", m["pipeline 1"],
                  m["bare 1"], target=0.95, **floor),
        timed_row("rate of the pipeline / encode_batch_fast, 2 threads on 2 cores", m["pipeline 2"],
                  m["bare 2"], target=0.90, **floor),
        timed_row("tokens per CPU second, pipeline / encode_batch_fast, 1 thread", m["pipeline 1 (CPU)"],
                  m["bare 1 (CPU)"], **rate),
        timed_row("tokens per CPU second, pipeline / encode_batch_fast, 2 threads", m["pipeline 2 (CPU)"],
                  m["bare 2 (CPU)"], **rate),
        timed_row("rate of the pipeline, 2 threads / 1", m["pipeline 2"], m["pipeline 1"], **rate),
        timed_row("rate of 2 tokenizing processes / 1", m["processes 2"], m["processes 1"], **rate),
        timed_row("CPU of 2 tokenizing processes / 1", m["processes 2 (CPU)"], m["processes 1 (CPU)"]),
        timed_row("rate of the pipeline / datasets streaming, 1 core", m["pipeline 1"], m["datasets"],
                  **rate),
        timed_row("rate of a mixture of three sources / one source, 2 threads", m["mixture 2"],
                  m["pipeline 2"], target=0.90, **floor),
        timed_row("rate shuffled / as the rows lie, 2 threads", m["shuffled 2"], m["pipeline 2"],
                  target=0.90, **floor),
        timed_row("rate of the mixture shuffled, with document marks / one source, 2 threads", m["masked 2"],
                  m["pipeline 2"], target=0.90, **floor),
        timed_row("rate of a mixture of three sources / datasets interleaved", m["mixture 2 beside datasets"],
                  m["datasets interleaved"], **rate),
        timed_row("opening a mixture to its first batch, at 99 % / at 0 %", m["mixture at 99 %"],
                  m["mixture at 0 %"], target=1.2),
        timed_row("opening a shuffled source to its first batch, at 99 % / at 0 %", m["shuffled at 99 %"],
                  m["shuffled at 0 %"], target=1.2),
        timed_row("CPU of the feed, 2 ranks / 1 rank", m["cpu of 2"], m["cpu of 1"], target=1.1),
        timed_row("CPU of the feed, rank 1 / rank 0 of the same run", m["cpu of rank 1 of 2"],
                  m["cpu of rank 0 of 2"]),
        timed_row("opening to first batch after a resume, at 99 % / at 0 %", m["first batch at 99 %"],
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
    size = (
        f"{corpus.rows:,} documents, {corpus.characters / 1e6:.1f} million characters, "
        f"{corpus.tokens / 1e6:.1f} million tokens"
    )
    return Report(
        name="data",
        title=f"The token stream: {size}",
        rows=tuple(rows_of(measured)),
        remarks=(
            f"Byte-level BPE of {VOCABULARY} ids with Qwen's splitting rule, on the standard library in "
            f"shards of prepare_data.py; seconds are those of one pass, of {PASSES} in a turn. The bare "
            "tokenizer has the same batches of texts in memory and throws the ids away; the pipeline reads "
            "parquet, cuts and hashes samples and keeps the place, measured in mid-stream (its opening has "
            "its own row).",
            "Both sides are held on as many cores as they have tokenizing threads: the pipeline's reading "
            "and cutting takes its time from them. On two threads the bare tokenizer runs one batch per "
            "thread, which is faster than its own parallelism over one batch.",
            "Tokenizing processes are what --num-proc uses from 4 cores on; a pass through them includes "
            "reading, and the CPU is that of the parent and the processes.",
        ),
        data={variant: summary(values) for variant, values in measured.items()},
    )
