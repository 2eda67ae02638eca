"""A small corpus and its stream, all ids of all texts in a row, computed without the code under test."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import argonne.data.tokenizer as data_tokenize
import argonne.testing.corpus as corpus
from argonne.data.position import DataPosition
from argonne.data.source import DataProgress, SourceOptions, SourceStep
from argonne.testing.sources import source_options
from data_stream import OpenedStream, open_stream


@dataclass(frozen=True)
class Reference:
    """A corpus and its tokens, computed without any of the code under test."""

    options: SourceOptions
    tokenizer: Any
    documents: list[np.ndarray]
    rows: list[tuple[str, int]]
    """(file name, row) of each document."""

    def stream(self, length: int) -> np.ndarray:
        one = np.concatenate(self.documents)
        return np.tile(one, length // len(one) + 1)[:length]

    def step(self, step: int, options: SourceOptions) -> np.ndarray:
        size, count = options.block_size, options.samples_per_step
        flat = self.stream((step + 1) * count * size + 1)
        return np.stack(
            [flat[i * size : i * size + size + 1] for i in range(step * count, (step + 1) * count)]
        )

    def place(self, token: int, block_size: int) -> DataPosition:
        """The position of the stream's token with this number, by walking over the documents."""
        epoch, rest = divmod(token, sum(map(len, self.documents)))
        for ids, (name, row) in zip(self.documents, self.rows, strict=True):
            if rest < len(ids):
                return DataPosition(
                    epoch=epoch,
                    file_index=int(name[4:9]),
                    file_name=name,
                    row=row,
                    token_offset=rest,
                    block_size=block_size,
                )
            rest -= len(ids)
        raise AssertionError("past the end")


def build_reference(folder: Path) -> Reference:
    """Shards and a tokenizer in ``folder``, and what they must give."""
    texts: list[str | None] = list(corpus.short_texts(60, 300))
    texts[5:5] = [None, ""]
    texts[30:30] = ["", None, "x", None]
    corpus.write_shards(folder / "data", texts, shards=4)
    tokenizer = data_tokenize.load_tokenizer(str(corpus.build_tokenizer(folder / "tokenizer")))
    documents, rows = [], []
    for path in sorted(glob.glob(str(folder / "data" / "*.parquet"))):
        for row, text in enumerate(pq.read_table(path)["text"].to_pylist()):
            if text:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                documents.append(np.array(ids, dtype=np.int32))
                rows.append((Path(path).name, row))
    options = source_options(
        str(folder / "data" / "*.parquet"), block_size=16, samples_per_step=4, num_proc=1
    )
    return Reference(options, tokenizer, documents, rows)


def opened(
    reference: Reference, options: SourceOptions, after: tuple[OpenedStream, DataProgress] | None = None
) -> OpenedStream:
    """A source from the start, or from what a checkpoint of ``after`` would hold (through JSON)."""
    if after is None:
        return open_stream(options, reference.tokenizer)
    source, progress = after
    saved = json.loads(json.dumps([source.position_dict(progress), source.state_dict(progress)]))
    return open_stream(
        options, reference.tokenizer, saved_position=saved[0], saved_state=saved[1], global_step=1
    )


def steps(source: OpenedStream, count: int) -> Iterator[SourceStep]:
    for _ in range(count):
        yield source.source.next_step()
    source.source.close()
