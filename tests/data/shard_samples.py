"""Shards with chosen rows, and the stream opened on them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from argonne.data.source import DataProgress, SourceOptions
from argonne.testing.sources import source_options
from data_stream import OpenedStream, open_stream


def options_for(folder: Path, **changes: Any) -> SourceOptions:
    """Blocks of 8 tokens, 2 samples a step, of the shards in ``folder``."""
    options = source_options(f"{folder}/*.parquet", block_size=8, samples_per_step=2, num_proc=1)
    return replace(options, **changes)


def texts_of(folder: Path, tokenizer: Any, steps: int = 1, **changes: Any) -> tuple[str, DataProgress]:
    """The decoded input tokens of the first steps."""
    source = open_stream(options_for(folder, **changes), tokenizer).source
    tokens = []
    for _ in range(steps):
        step = source.next_step()
        tokens.extend(step.tokens[:, :-1].ravel().tolist())
    source.close()
    return tokenizer.decode(tokens), step.progress


def write_column(path: Path, values: Any, type_: pa.DataType | None = None, name: str = "text") -> Path:
    """A shard with ``values`` in column ``name``; returns its path."""
    pq.write_table(pa.table({name: pa.array(values, type_), "id": pa.array(range(len(values)))}), path)
    return path


def resume(
    source: OpenedStream, progress: DataProgress, options: SourceOptions, tokenizer: Any
) -> OpenedStream:
    """The stream opened again where ``progress`` stands, by what a checkpoint would hold of it."""
    saved = json.loads(json.dumps([source.position_dict(progress), source.state_dict(progress)]))
    return open_stream(options, tokenizer, saved_position=saved[0], saved_state=saved[1], global_step=1)
