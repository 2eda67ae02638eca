"""Shards of token ids in every layout, made of the same texts, and their stream."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from argonne.data.tokenizer import plain_ids


def documents_of(tokenizer: Any, texts: Sequence[str | None]) -> list[list[int]]:
    """The ids of each text with its EOS."""
    return [[*plain_ids(tokenizer, text), tokenizer.eos_token_id] for text in texts if text]


def write_lists(path: Path, rows: Sequence[Any], type_: pa.DataType, group: int = 5) -> Path:
    """A parquet shard with the rows in the column ``ids``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"ids": pa.array(rows, type_)}), path, row_group_size=group)
    return path


def write_flat(path: Path, ids: Sequence[int] | np.ndarray, dtype: str = "<u2", **header: int) -> Path:
    """A flat file, written without any of the code under test; ``header``: magic, version or count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = np.zeros(256, "<i4")
    head[:3] = header.get("magic", 20240520), header.get("version", 1), header.get("count", len(ids))
    path.write_bytes(head.tobytes() + np.asarray(ids).astype(dtype).tobytes())
    return path


def naive_steps(documents: Sequence[Sequence[int]], size: int, count: int, steps: int) -> list[np.ndarray]:
    """The samples of the first steps: all ids in a row, again and again, sliced."""
    flat = np.concatenate([np.asarray(document) for document in documents])
    flat = np.tile(flat, steps * count * size // len(flat) + 2)
    samples = [flat[i * size : i * size + size + 1] for i in range(steps * count)]
    return [np.stack(samples[s * count : (s + 1) * count]) for s in range(steps)]
