"""A corpus of token ids at a glance: its shards, their tokens, and the first ids decoded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from argonne.errors import DataError

if TYPE_CHECKING:
    from argonne.data.shards import Shard

LISTED_SHARDS = 20
SHOWN_TOKENS = 64


def show_tokens(shards: Sequence[Shard], column: str, options: argparse.Namespace) -> int:
    """Print the shards, how many tokens each holds, and with a tokenizer the text they begin with.

    Returns the tokens of all.
    """
    from argonne.data.formats import open_shard

    counts = []
    for shard in shards:
        if shard.fault:
            counts.append(0)
            continue
        with open_shard(shard.path, column) as reader:
            counts.append(reader.token_count())
    print(f"{'shard':32} {'rows':>12} {'row groups':>10} {'MiB':>9} {'tokens':>16}")
    for index, (shard, count) in enumerate(zip(shards, counts, strict=True)):
        if not options.all and LISTED_SHARDS <= index < len(shards) - 1:
            if index == LISTED_SHARDS:
                print(f"... {len(shards) - LISTED_SHARDS - 1} more (--all lists them)")
            continue
        row = f"{shard.name:32} {shard.rows:12,} {len(shard.group_rows):10,} {shard.size / 2**20:9.1f}"
        print(f"{row} {count:16,}  {shard.fault}".rstrip())
    print(f"{len(shards):,} shards, {sum(shard.rows for shard in shards):,} rows, {sum(counts):,} tokens")
    if options.tokenizer_path is not None:
        print(f"they begin with: {first_text(shards, column, options)!r}")
    return sum(counts)


def first_text(shards: Sequence[Shard], column: str, options: argparse.Namespace) -> str:
    """The first tokens of the corpus, decoded."""
    import pyarrow as pa

    from argonne.data.formats import open_shard
    from argonne.data.texts import ShardError
    from argonne.data.token_rows import TokenRow
    from argonne.data.tokenizer import load_tokenizer
    from argonne.errors import one_line

    tokenizer = load_tokenizer(options.tokenizer_path, options.trust_remote_code)
    shard = next(shard for shard in shards if shard.rows)
    try:
        with open_shard(shard.path, column) as reader:
            for group in range(len(shard.group_rows)):
                for batch in reader.batches(group):
                    for row in batch.texts:
                        if isinstance(row, TokenRow) and len(row):
                            return str(tokenizer.decode(row.ids[:SHOWN_TOKENS].tolist()))
    except (ShardError, pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {shard.path}: {one_line(error)}: repair it") from error
    return ""
