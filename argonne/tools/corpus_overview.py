"""A corpus at a glance: its shards, their sizes, and estimates of documents and tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from argonne.errors import DataError

if TYPE_CHECKING:
    from argonne.data.shards import Shard

LISTED_SHARDS = 20
SAMPLED_SHARDS = 16
SAMPLED_ROWS = 32
SAMPLED_CHARACTERS = 100_000


def show_corpus(options: argparse.Namespace) -> float | None:
    """Print the shards, their sizes, and estimates of documents and tokens; returns that of the tokens."""
    from argonne.data.flat_tokens import is_flat
    from argonne.data.shards import open_corpus
    from argonne.data.token_rows import TokenColumn
    from argonne.tools.token_overview import show_tokens

    tokens = options.token_column
    column = TokenColumn(tokens) if tokens is not None else options.text_column or "text"
    shards = open_corpus(
        options.data_glob,
        column,
        skip_bad_shards=options.skip_bad_shards,
        cache_dir=options.cache_dir,
    )
    if tokens is not None or all(is_flat(shard.name) for shard in shards):
        return float(show_tokens(shards, column, options))
    text_bytes = [shard_text_bytes(shard, column) for shard in shards]
    share, tokens_per_byte = sample_corpus(shards, column, options)
    print(f"{'shard':32} {'rows':>12} {'row groups':>10} {'MiB':>9} {'text MiB':>9} {'tokens (about)':>16}")
    for index, shard in enumerate(shards):
        if not options.all and LISTED_SHARDS <= index < len(shards) - 1:
            if index == LISTED_SHARDS:
                print(f"... {len(shards) - LISTED_SHARDS - 1} more (--all lists them)")
            continue
        size = text_bytes[index]
        row = f"{shard.name:32} {shard.rows:12,} {len(shard.group_rows):10,} {shard.size / 2**20:9.1f}"
        print(f"{row} {size / 2**20:9.1f} {estimate(size, tokens_per_byte):>16}  {shard.fault}".rstrip())
    rows = sum(shard.rows for shard in shards)
    print(f"{len(shards):,} shards, {rows:,} rows, about {round(rows * share):,} documents (rows with text)")
    total = sum(text_bytes)
    print(f"text: {total / 2**20:,.1f} MiB, {estimate(total, tokens_per_byte)} tokens (estimated)")
    if tokens_per_byte is None:
        print("give --tokenizer-path for an estimate of the tokens")
        return None
    return total * tokens_per_byte


def estimate(size: int, tokens_per_byte: float | None) -> str:
    return "?" if tokens_per_byte is None else f"{round(size * tokens_per_byte):,}"


def shard_text_bytes(shard: Shard, column: str) -> int:
    """Bytes of text in a shard, from its footer; 0 for one that cannot be used."""
    from argonne.data.formats import open_shard

    if shard.fault:
        return 0
    with open_shard(shard.path, column) as reader:
        return reader.text_bytes()


def sample_corpus(
    shards: Sequence[Shard], column: str, options: argparse.Namespace
) -> tuple[float, float | None]:
    """(share of rows that are documents, tokens per byte of text or None) from rows all over the corpus."""
    from argonne.data.tokenizer import load_tokenizer, probe_ids

    tokenizer = (
        load_tokenizer(options.tokenizer_path, options.trust_remote_code) if options.tokenizer_path else None
    )
    rows = documents = size = tokens = 0
    for text in sampled_rows(shards, column):
        rows += 1
        if text:
            documents += 1
            part = text[:SAMPLED_CHARACTERS]
            size += len(part.encode())
            tokens += len(probe_ids(tokenizer, part) or ()) + 1 if tokenizer is not None else 0
    return documents / max(rows, 1), tokens / max(size, 1) if tokenizer is not None else None


def sampled_rows(shards: Sequence[Shard], column: str) -> Iterator[str | None]:
    good = [shard for shard in shards if shard.rows]
    for shard in good[:: max(1, len(good) // SAMPLED_SHARDS)]:
        yield from middle_rows(shard, column)


def middle_rows(shard: Shard, column: str) -> list[str | None]:
    """The first rows of the shard's middle row group."""
    import pyarrow as pa

    from argonne.data.formats import open_shard
    from argonne.data.texts import LongText, ShardError
    from argonne.errors import one_line

    texts: list[Any] = []
    try:
        with open_shard(shard.path, column) as reader:
            for batch in reader.batches(len(shard.group_rows) // 2):
                texts += [
                    next(text.stretches()) if isinstance(text, LongText) else text for text in batch.texts
                ]
                if len(texts) >= SAMPLED_ROWS:
                    break
    except (ShardError, pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {shard.path}: {one_line(error)}: repair it") from error
    return texts[:SAMPLED_ROWS]
