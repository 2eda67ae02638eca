"""Samples against a few lines of numpy: slices of the concatenation, or windows of each document alone."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from argonne.data.documents import Counts, Document
from argonne.data.position import DataPosition
from argonne.data.samplers import PackedSampler, WindowSampler
from argonne.data.stream import EncodedBatch
from argonne.errors import DataError

LENGTHS = (5, 1, 12, 3, 9, 2)
SIZE = 4


def document(epoch: int, row: int) -> Document:
    return Document(epoch, 0, row, "", Counts(documents=row), 0)


def epochs(lengths: Sequence[int]) -> Iterator[tuple[Document, np.ndarray]]:
    """The documents, epoch after epoch; an id tells its epoch, its row and its place in the row."""
    for epoch in itertools.count():
        for row, length in enumerate(lengths):
            yield document(epoch, row), 10_000 * epoch + 100 * row + np.arange(length, dtype=np.int32)


def batches(lengths: Sequence[int], cut: int, skip: int = 0) -> Iterator[EncodedBatch]:
    """The stream from document ``skip`` on, in batches of ``cut`` ids, wherever documents begin."""
    ids = np.empty(0, np.int32)
    beginnings = []
    for place, tokens in itertools.islice(epochs(lengths), skip, None):
        beginnings.append((len(ids), 0, place.mark()))
        ids = np.concatenate((ids, tokens))
        while len(ids) >= cut:
            yield EncodedBatch(ids[:cut], [entry for entry in beginnings if entry[0] < cut])
            ids = ids[cut:]
            beginnings = [(at - cut, token, mark) for at, token, mark in beginnings if at >= cut]


def flat(lengths: Sequence[int], length: int) -> np.ndarray:
    found: list[np.ndarray] = []
    for _, tokens in epochs(lengths):
        found.append(tokens)
        if sum(map(len, found)) >= length:
            return np.concatenate(found)[:length]
    raise AssertionError("unreachable")


def position(token: int, size: int = SIZE) -> DataPosition:
    """Of an id of the stream, which tells it."""
    epoch, rest = divmod(token, 10_000)
    return DataPosition(epoch=epoch, row=rest // 100, token_offset=rest % 100, block_size=size)


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 50])
@pytest.mark.parametrize("size", [2, 4, 32])
def test_packed_samples_are_slices_of_the_concatenation(cut: int, size: int) -> None:
    sampler = PackedSampler(batches(LENGTHS, cut), size, None)
    counts = (1, 3, 2, 1)
    stream = flat(LENGTHS, sum(counts) * size + 1)
    taken = 0
    for count in counts:
        found = sampler.take(count)
        places = [(taken + sample) * size for sample in range(count)]
        assert found.tokens.dtype == np.int32
        assert found.tokens.tolist() == [stream[at : at + size + 1].tolist() for at in places]
        inputs = np.stack([stream[at : at + size] for at in places])
        assert found.starts.tolist() == (inputs % 100 == 0).tolist()
        taken += count
        following = position(int(stream[taken * size]))
        here = (found.document.epoch, found.document.row, found.token_offset)
        assert here == (following.epoch, following.row, following.token_offset)
        assert found.document.counts.documents == found.document.row


@pytest.mark.parametrize("cut", [2, 5, 40])
@pytest.mark.parametrize("used", range(33))
def test_a_packed_stream_goes_on_at_any_token(used: int, cut: int) -> None:
    stream = flat(LENGTHS, used + 3 * SIZE + 1)
    start = position(int(stream[used]))
    sampler = PackedSampler(batches(LENGTHS, cut, skip=6 * start.epoch + start.row), SIZE, start)
    found = sampler.take(3)
    assert found.tokens.tolist() == [stream[at : at + SIZE + 1].tolist() for at in (used, used + 4, used + 8)]
    marked = (stream[used : used + 12].reshape(3, SIZE) % 100 == 0).tolist()
    assert found.starts.tolist() == marked


@pytest.mark.parametrize("cut", [2, 5, 40])
@pytest.mark.parametrize("offset", [12, 13, 400])
def test_a_place_past_the_end_of_its_document_means_the_next_one(offset: int, cut: int) -> None:
    """A pipeline checkpoint's chunk may be the last one, which is not full."""
    start = DataPosition(row=2, token_offset=offset, block_size=SIZE)
    found = PackedSampler(batches(LENGTHS, cut, skip=2), SIZE, start).take(1)
    assert found.tokens[0, 0] == 300


def test_at_a_row_without_text_nothing_was_used_of_the_next_one() -> None:
    start = DataPosition(row=1, token_offset=3, block_size=SIZE)  # the reader begins with row 2
    found = PackedSampler(batches(LENGTHS, 7, skip=2), SIZE, start).take(1)
    assert found.tokens[0].tolist() == [200, 201, 202, 203, 204]


def test_the_starts_of_blocks_are_told_apart_from_their_beginnings() -> None:
    """Rows that are blocks of a stream: only what ``starts`` says begins a document."""
    ids = np.arange(12, dtype=np.int32)
    marks = [(0, 0, document(0, 0).mark()), (6, 0, document(0, 1).mark())]
    batch = EncodedBatch(ids, marks, starts=np.array([0, 3, 7]))
    found = PackedSampler(iter([batch]), SIZE, None).take(2)
    assert np.flatnonzero(found.starts).tolist() == [0, 3, 7]
    assert (found.document.row, found.token_offset) == (1, 2)


def windows(lengths: Sequence[int], size: int, count: int) -> list[list[int]]:
    """size + 1 tokens every size tokens of each document alone."""
    found: list[list[int]] = []
    for _, tokens in epochs(lengths):
        found += [tokens[at : at + size + 1].tolist() for at in range(0, len(tokens) - size, size)]
        if len(found) >= count:
            return found[:count]
    raise AssertionError("unreachable")


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 50])
@pytest.mark.parametrize("size", [2, 4, 11])
def test_windows_are_cut_from_each_document_alone(cut: int, size: int) -> None:
    sampler = WindowSampler(batches(LENGTHS, cut), size, None)
    expected = windows(LENGTHS, size, 8)
    taken = 0
    for count in (1, 4, 2):
        found = sampler.take(count)
        assert found.tokens.tolist() == expected[taken : taken + count]
        assert not found.starts.any() and found.starts.shape == (count, size)
        taken += count
        following = position(expected[taken][0])
        assert (found.document.row, found.token_offset) == (following.row, following.token_offset)


@pytest.mark.parametrize("done", range(1, 8))
def test_windows_go_on_where_they_stopped(done: int) -> None:
    expected = windows(LENGTHS, SIZE, 12)
    start = position(expected[done][0])
    sampler = WindowSampler(batches(LENGTHS, 5, skip=6 * start.epoch + start.row), SIZE, start)
    assert sampler.take(4).tokens.tolist() == expected[done : done + 4]


def test_a_corpus_of_short_documents_ends_instead_of_reading_for_ever() -> None:
    said = r"no document has 13 tokens \(--no-packing with --block-size 12\): lower --block-size or"
    with pytest.raises(DataError, match=said) as caught:
        WindowSampler(batches(LENGTHS, 5), 12, None).take(1)
    assert "\n" not in str(caught.value)
    assert WindowSampler(batches(LENGTHS, 5), 11, None).take(1).tokens[0, 0] == 200
