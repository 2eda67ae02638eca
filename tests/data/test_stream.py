"""The token stream against a naive one: all ids of all texts in a row, sliced."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import argonne.data.encoder_pool as encoder_pool
import argonne.data.stream as data_stream
import argonne.data.texts as data_texts
import argonne.data.tokenizer as data_tokenize
import argonne.testing.corpus as corpus
from argonne.data.documents import Counts, Document
from argonne.data.source import chain_hash
from argonne.data.stream import encoded_documents
from argonne.errors import DataError
from tests.data.stream_reference import Reference, build_reference, opened, steps


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return build_reference(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("block_size", "samples", "workers"), [(16, 4, 1), (97, 3, 2), (7, 1, 3), (1, 50, 1), (4096, 3, 2)]
)
def test_steps_are_slices_of_the_concatenation(
    reference: Reference, block_size: int, samples: int, workers: int
) -> None:
    options = replace(reference.options, block_size=block_size, samples_per_step=samples, num_proc=workers)
    total = sum(map(len, reference.documents))
    count = min(150, max(3, 5 * total // (2 * block_size * samples)))  # past the end of an epoch or two
    stream_hash = "0" * 32
    for index, step in enumerate(steps(opened(reference, options), count)):
        expected = reference.step(index, options)
        assert step.tokens.dtype == np.int32 and np.array_equal(step.tokens, expected)
        assert step.progress.position == reference.place((index + 1) * samples * block_size, block_size)
        stream_hash = chain_hash(stream_hash, expected)
        assert step.progress.stream_hash == stream_hash
    assert step.progress.samples == count * samples


def test_resume_at_every_step_equals_the_unbroken_run(reference: Reference) -> None:
    options = replace(reference.options, block_size=50, samples_per_step=5)
    total = sum(map(len, reference.documents))
    count = 3 * total // (2 * 250)
    source = opened(reference, options)
    unbroken = list(steps(source, count))
    for index in range(count - 1):
        again = opened(reference, options, (source, unbroken[index].progress))
        (step,) = steps(again, 1)
        assert np.array_equal(step.tokens, unbroken[index + 1].tokens), index
        assert (
            step.progress == unbroken[index + 1].progress
        )  # position, hash, samples, counts of skipped rows


def test_many_interruptions_and_changing_groupings(reference: Reference) -> None:
    """The samples and their hash depend on nothing but their number."""
    block_size, rng = 23, np.random.default_rng(1)
    taken: list[np.ndarray] = []
    after = None
    for workers in (1, 2, 3) * 4:
        samples = int(rng.integers(1, 9))
        options = replace(
            reference.options, block_size=block_size, samples_per_step=samples, num_proc=workers
        )
        source = opened(reference, options, after)
        for step in steps(source, int(rng.integers(1, 12))):
            taken.extend(step.tokens)
        after = source, step.progress
    whole = reference.step(0, replace(options, samples_per_step=len(taken)))
    assert np.array_equal(np.stack(taken), whole)
    assert step.progress.stream_hash == chain_hash("0" * 32, whole)
    assert step.progress.samples == len(taken)


def test_another_block_size_goes_on_at_the_same_token(reference: Reference) -> None:
    first = replace(reference.options, block_size=33, samples_per_step=3)
    source = opened(reference, first)
    done = list(steps(source, 7))[-1].progress
    second = replace(reference.options, block_size=20, samples_per_step=2)
    again = opened(reference, second, (source, done))
    assert any("--block-size was 33" in notice for notice in again.notices)
    assert any(
        "global batch" in notice and "was 3" in notice and "is 2" in notice for notice in again.notices
    )
    (step,) = steps(again, 1)
    start = 7 * 3 * 33
    flat = reference.stream(start + 41)[start:]
    assert np.array_equal(step.tokens, np.stack([flat[:21], flat[20:41]]))


def test_processes_give_the_same_tokens(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_pool, "PROCESSES_FROM", 2)
    monkeypatch.setattr(encoder_pool, "usable_cpus", lambda: 2)
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 1000)
    options = replace(reference.options, num_proc=2)
    source = opened(reference, options)
    for index, step in enumerate(steps(source, 40)):
        assert np.array_equal(step.tokens, reference.step(index, options))


def test_batches_and_pieces_leave_no_trace(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny batches: documents begin and end anywhere in them; resumed in the middle of a long document."""
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 1)
    options = replace(reference.options, block_size=11, samples_per_step=3, num_proc=2)
    source = opened(reference, options)
    unbroken = list(steps(source, 60))
    for index, step in enumerate(unbroken):
        assert np.array_equal(step.tokens, reference.step(index, options))
    for index in range(0, 59, 6):
        (step,) = steps(opened(reference, options, (source, unbroken[index].progress)), 1)
        assert np.array_equal(step.tokens, unbroken[index + 1].tokens)


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the consumer: each worker's batches, and no more."""
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 1)
    read: list[int] = []

    class Pool:
        workers = 3

        def submit(self, texts: Sequence[str], last: Sequence[bool]) -> Future[tuple[np.ndarray, np.ndarray]]:
            done: Future[tuple[np.ndarray, np.ndarray]] = Future()
            done.set_result((np.ones(len(texts), np.int32), np.ones(len(texts), np.int64)))
            return done

    def endless() -> Iterator[Document]:
        while True:
            read.append(len(read))
            yield Document(0, 0, len(read) - 1, "x", Counts(), 0)

    pool: Any = Pool()
    for taken, batch in enumerate(encoded_documents(endless(), pool), start=1):
        assert batch.beginnings[0][2][2] == taken - 1
        assert len(read) - taken <= data_stream.BATCHES_PER_WORKER * pool.workers
        if taken == 50:
            break


def long_text_ids(tokenizer: Any, text: str, limit: int) -> list[int]:
    """The rule for long texts in the words of its definition."""
    ids: list[int] = []
    while len(text) > limit:
        window = text[:limit]
        cut = window.rindex("\n") + 1 if "\n" in window else limit
        ids += tokenizer(text[:cut], add_special_tokens=False)["input_ids"]
        text = text[cut:]
    return ids + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


@pytest.mark.parametrize("newlines", [True, False])
def test_long_texts_are_cut_by_the_rule(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newlines: bool
) -> None:
    monkeypatch.setattr(data_tokenize, "PIECE_CHARACTERS", 500)
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(data_texts, "LONG_BYTES", 3000)
    monkeypatch.setattr(data_texts, "BATCH_BYTES", 900)
    long_text = "".join(corpus.short_texts(12, 400))
    texts = ["short", long_text if newlines else long_text.replace("\n", " "), "x" * 500, "end"]
    corpus.write_shards(tmp_path, texts, shards=1)
    options = replace(reference.options, data_glob=str(tmp_path), block_size=9, samples_per_step=2)
    ids = np.concatenate([long_text_ids(reference.tokenizer, text, 500) for text in texts])
    flat = np.tile(ids, 3)
    source = opened(reference, options)
    unbroken = list(steps(source, 2 * len(ids) // 18))
    for index, step in enumerate(unbroken):
        assert np.array_equal(step.tokens[0], flat[index * 18 : index * 18 + 10])
    for index in range(0, len(unbroken) - 1, 13):
        (step,) = steps(opened(reference, options, (source, unbroken[index].progress)), 1)
        assert np.array_equal(step.tokens, unbroken[index + 1].tokens)


def windows(documents: list[np.ndarray], size: int) -> list[tuple[int, np.ndarray]]:
    return [
        (number, ids[start : start + size + 1])
        for number, ids in enumerate(documents)
        for start in range(0, len(ids) - size, size)
    ]


@pytest.mark.parametrize("batch_characters", [1, 1 << 18])
def test_no_packing_cuts_each_document_alone(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, batch_characters: int
) -> None:
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", batch_characters)
    monkeypatch.setattr(data_tokenize, "PIECE_CHARACTERS", 100)
    documents = [
        np.array(long_text_ids(reference.tokenizer, reference.tokenizer.decode(ids[:-1]), 100))
        for ids in reference.documents
    ]
    options = replace(reference.options, block_size=30, samples_per_step=3, packing=False)
    expected = windows(documents, 30) * 3
    source = opened(reference, options)
    unbroken = list(steps(source, 2 * len(expected) // 9))
    for index, step in enumerate(unbroken):
        assert np.array_equal(
            step.tokens, np.stack([window for _, window in expected[3 * index : 3 * index + 3]])
        )
        number = expected[3 * index + 3][0]
        position = step.progress.position
        assert (position.file_name, position.row) == reference.rows[number]
        assert position.token_offset == 30 * position.chunk
    for index in range(0, len(unbroken) - 1, 7):
        (step,) = steps(opened(reference, options, (source, unbroken[index].progress)), 1)
        assert np.array_equal(step.tokens, unbroken[index + 1].tokens)
        assert step.progress == unbroken[index + 1].progress


def test_no_packing_with_only_short_documents_is_an_error(reference: Reference) -> None:
    source = opened(reference, replace(reference.options, block_size=5000, packing=False))
    with pytest.raises(DataError, match=r"no document has 5001 tokens .*--block-size"):
        source.source.next_step()
    source.source.close()
