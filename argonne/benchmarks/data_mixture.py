"""Mixtures and shuffle in the data benchmark: three sources of its corpus, and `datasets` interleaved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from argonne.benchmarks.data_corpus import Corpus
from argonne.data.source import MixPart, SourceOptions
from data_stream import open_stream

WEIGHTS = {"half": "0.5", "third": "0.3", "rest": "0.2"}
_DIGITS = ("[0369]", "[147]", "[258]")
"""Of the last digit of the shards' names: three sources without a shard in common."""


def mixed(corpus: Corpus, threads: int) -> SourceOptions:
    """Three sources in place of one."""
    parts = [
        MixPart(name, weight, str(corpus.folder / "data" / f"*{digits}.parquet"))
        for (name, weight), digits in zip(WEIGHTS.items(), _DIGITS, strict=True)
    ]
    return replace(corpus.options(threads), mix=tuple(parts))


def shuffled(corpus: Corpus, threads: int) -> SourceOptions:
    """The one source with --shuffle."""
    return replace(corpus.options(threads), shuffle=True)


def mixed_shuffled_masked(corpus: Corpus, threads: int) -> SourceOptions:
    """Three sources, shuffled, telling where documents begin: what --document-attention reads."""
    return replace(mixed(corpus, threads), shuffle=True, document_attention=True)


def tokens_encoded(source: Any) -> int:
    """Tokens that the samplers of a source or a mixture have been given so far."""
    parts = source._sources.values() if hasattr(source, "_sources") else [source._source]
    return sum(part._sampler._filled for part in parts)


def opened_late(corpus: Corpus, options: SourceOptions, share: float) -> float:
    """Seconds from opening a source or mixture at ``share`` of its first epoch to its first step."""
    places = {}
    parts: dict[str, str | Sequence[str]] = {part.name: part.glob for part in options.mix}
    parts = parts or {"": options.data_glob}
    for name, glob in parts.items():
        own = open_stream(replace(options, mix=(), data_glob=glob), corpus.tokenizer)
        own.source.close()
        order = options.order.shards(0, len(own.shards))
        index = order[min(len(order) - 1, int(share * len(order)))]
        groups = [group for group, _ in options.order.groups(0, index, own.shards[index], None)]
        row = own.shards[index].first_rows[groups[min(len(groups) - 1, int(share * len(groups)))]]
        place = {"epoch": 0, "file_name": own.shards[index].name, "row": row, "token_offset": 0}
        places[name] = {**place, "streaming": True, "current_file_idx": index, "samples": 0}
    weights = {part.name: part.weight for part in options.mix}
    saved = {"sources": places, "mixture": {"weights": weights, "n": 0}} if weights else places[""]
    start = time.perf_counter()
    source = open_stream(options, corpus.tokenizer, saved_position=saved, global_step=1).source
    source.next_step()
    seconds = time.perf_counter() - start
    source.close()
    return seconds


def datasets_interleaved(corpus: Corpus) -> float:
    """Seconds in which `datasets` interleaves and tokenizes the three sources, for the corpus' tokens."""
    import datasets

    sources = [
        datasets.load_dataset(
            "parquet",
            data_files=str(corpus.folder / "data" / f"*{digits}.parquet"),
            split="train",
            streaming=True,
        )
        for digits in _DIGITS
    ]
    weights = [float(weight) for weight in WEIGHTS.values()]
    start, tokens = time.perf_counter(), 0
    rows = datasets.interleave_datasets(sources, probabilities=weights, seed=0).map(
        lambda batch: {"input_ids": corpus.tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=["text"],
    )
    for row in rows:
        tokens += len(row["input_ids"]) + 1
    return (time.perf_counter() - start) * corpus.tokens / tokens
