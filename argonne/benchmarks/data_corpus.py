"""The corpus of the data benchmark: the standard library in shards, its tokenizer, its size in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne.data.documents import DocumentReader
from argonne.data.position import DataPosition
from argonne.data.shards import open_corpus
from argonne.data.source import SourceOptions
from argonne.data.stream import text_batches
from argonne.data.tokenizer import EncoderRecipe, load_tokenizer, plain_ids
from argonne.errors import DataError
from argonne.testing.corpus import build_tokenizer
from argonne.testing.sources import source_options
from argonne.tools.library_corpus import documents
from argonne.tools.shard_writer import ShardWriter

VOCABULARY = 16384
SHARD_MIB, ROW_GROUP_MIB = 1.4, 0.5
BLOCK_SIZE, SAMPLES = 4096, 4
"""A step of the training script's own defaults."""


class Corpus:
    """The standard library's text in shards, its tokenizer, and how many steps one pass of it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts = documents()
        write(texts, folder / "data")
        self.tokenizer_path = str(build_tokenizer(folder / "tokenizer", VOCABULARY))
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        self.rows, self.characters = len(texts), sum(map(len, texts))
        self.shards = open_corpus(str(folder / "data"), "text")
        self.batches = [texts for texts, _, _ in text_batches(iter(self.reader()))]
        """The texts as the pipeline hands them to its tokenizing threads."""
        backend = self.tokenizer.backend_tokenizer
        self.tokens = self.rows + sum(count_tokens(backend, batch) for batch in self.batches)
        self.steps = self.tokens // (BLOCK_SIZE * SAMPLES)

    def reader(self) -> DocumentReader:
        """One pass through the shards."""
        return DocumentReader(self.shards, "text", DataPosition(), epochs=1)

    def options(self, threads: int) -> SourceOptions:
        return source_options(
            str(self.folder / "data" / "*.parquet"),
            block_size=BLOCK_SIZE,
            samples_per_step=SAMPLES,
            num_proc=threads,
            cache_dir=self.folder / "cache",
        )


def write(texts: list[str], folder: Path) -> None:
    """Shards as scripts/prepare_data.py makes them."""
    folder.mkdir()
    writer = ShardWriter(folder, shard_mib=SHARD_MIB, row_group_mib=ROW_GROUP_MIB, compression="zstd")
    for text in texts:
        writer.add(text)
    writer.finish()


def count_tokens(backend: Any, batch: list[str]) -> int:
    """Tokens of a batch by the bare tokenizer, whose ids are thrown away."""
    return sum(len(encoding) for encoding in backend.encode_batch_fast(batch, add_special_tokens=False))


def check_ids(corpus: Corpus) -> None:
    """The pipeline's encoder gives the ids of the plain call."""
    texts = corpus.batches[0]
    ids, _ = EncoderRecipe(tokenizer=corpus.tokenizer).build().encode(texts, [False] * len(texts))
    if ids.tolist() != [token for text in texts for token in plain_ids(corpus.tokenizer, text)]:
        raise DataError("the pipeline's ids are not the tokenizer's: nothing here can be compared")
