"""A corpus of one short document, repeated: read once, read ahead in bounds, the stream as defined."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import argonne.data.documents as document_reader
import argonne.data.stream as stream
import argonne.testing.corpus as corpus
from argonne.data.documents import Document, DocumentReader
from argonne.data.encoder_pool import EncoderPool
from argonne.data.position import DataPosition
from argonne.data.shards import open_corpus
from argonne.data.stream import text_batches
from argonne.data.tokenizer import EncoderRecipe, load_tokenizer
from argonne.errors import DataError
from data_stream import open_stream
from tests.data.shard_samples import options_for


@pytest.fixture
def opened_shards(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards opened by the reader, in order."""
    opened, open_shard = [], document_reader.open_shard

    def counted(path: Path, column: str) -> Any:
        opened.append(path)
        return open_shard(path, column)

    monkeypatch.setattr(document_reader, "open_shard", counted)
    return opened


def test_the_repeated_corpus_is_read_once_and_equals_rereading(
    tmp_path: Path, opened_shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write_shards(tmp_path, [None, "one", "", "two", None, "three"], shards=2)
    shards, start = open_corpus(str(tmp_path), "text"), DataPosition(file_index=1, row=1)

    def documents() -> list[Document]:
        return list(islice(DocumentReader(shards, "text", start), 50))

    kept = documents()
    assert len(opened_shards) == 3  # the rest of the first epoch, then one whole epoch
    monkeypatch.setattr(document_reader, "KEPT_COST", 0)
    assert kept == documents()
    assert len(opened_shards) > 20


def test_a_kept_shard_that_is_rewritten_is_noticed(tmp_path: Path) -> None:
    corpus.write_shards(tmp_path, ["one"], shards=1)
    documents = iter(DocumentReader(open_corpus(str(tmp_path), "text"), "text", DataPosition()))
    assert [document.epoch for document in islice(documents, 3)] == [0, 1, 2]
    corpus.write_shards(tmp_path, ["another text"], shards=1)
    with pytest.raises(DataError, match="rewritten"):
        next(documents)


def test_the_first_step_of_many_workers_reads_a_bounded_number_of_documents(
    tmp_path: Path, opened_shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write_shards(tmp_path / "data", ["a"], shards=1)
    tokenizer = load_tokenizer(str(corpus.build_tokenizer(tmp_path / "tokenizer")))
    submitted = 0

    def counted(documents: Iterator[Document]) -> Iterator[Any]:
        nonlocal submitted
        for batch in text_batches(documents):
            submitted += len(batch[0])
            yield batch

    monkeypatch.setattr(stream, "text_batches", counted)
    monkeypatch.setattr("argonne.data.encoder_pool.PROCESSES_FROM", 1000)
    monkeypatch.setattr("argonne.data.encoder_pool.usable_cpus", lambda: 64)
    source = open_stream(options_for(tmp_path / "data", num_proc=64), tokenizer).source
    tokens = source.next_step().tokens
    source.close()
    ids = [*tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    flat = np.tile(ids, 20)
    assert np.array_equal(tokens, np.stack([flat[:9], flat[8:17]]))
    assert len(opened_shards) == 1
    assert submitted <= stream.DOCUMENTS_AHEAD + stream.BATCH_CHARACTERS // stream.DOCUMENT_COST


def test_reading_ahead_is_bounded_in_epochs_and_begins_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One short document, 64 workers: the first batch comes early, and few epochs are ahead."""
    corpus.write_shards(tmp_path / "data", ["a"], shards=1)
    tokenizer = load_tokenizer(str(corpus.build_tokenizer(tmp_path / "tokenizer")))
    monkeypatch.setattr("argonne.data.encoder_pool.PROCESSES_FROM", 1000)
    pool = EncoderPool(EncoderRecipe(tokenizer=tokenizer), 64, processes=False)
    read: list[int] = []

    def documents() -> Iterator[Document]:
        for document in DocumentReader(open_corpus(str(tmp_path / "data"), "text"), "text", DataPosition()):
            read.append(document.epoch)
            yield document

    for index, batch in enumerate(islice(stream.encoded_documents(documents(), pool), 200)):
        if index == 0:
            assert len(read) <= 3 * stream.EPOCHS_PER_BATCH
        first = batch.beginnings[0][2][0]
        assert read[-1] - first <= stream.EPOCHS_AHEAD + 2 * stream.EPOCHS_PER_BATCH
    pool.close()
