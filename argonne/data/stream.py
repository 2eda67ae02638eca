"""Token ids of the documents, made ahead of need: the stream that samplers.py cuts into samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeAlias

import numpy as np

from argonne.data.documents import DOCUMENT_COST, Document, Mark
from argonne.data.encoder_pool import EncoderPool
from argonne.data.token_rows import TokenRow
from argonne.data.tokenizer import UnencodableError, text_pieces

BATCH_CHARACTERS = 1 << 19
"""Text handed to one tokenizing worker at a time, characters."""
FIRST_BATCH_CHARACTERS = 1 << 13
"""The first batch is this small and each next one twice as large, so that the first step waits little."""
BATCHES_PER_WORKER = 2
EPOCHS_PER_BATCH = 64
EPOCHS_AHEAD = 256
"""Epochs read ahead of the consumer at most, which binds where a corpus is one short document."""
DOCUMENTS_AHEAD = 1 << 14
"""Pieces of documents read ahead of the consumer at most, whatever the number of workers."""

EncodedTexts: TypeAlias = tuple[np.ndarray, np.ndarray]
"""(ids int32, length of each text int64)."""


Beginning: TypeAlias = tuple[int, int, Mark]
"""(place in the ids, token, mark): at that place stands the document's token of that number: 0, but for the
first document of a run that resumes within it."""


class EncodedBatch(NamedTuple):
    """Consecutive tokens of the stream, and where documents begin in them."""

    ids: np.ndarray
    beginnings: list[Beginning]
    unencodable: Sequence[tuple[Mark, str]] = ()
    """Documents for which the tokenizer has no ids, and what it says. They begin here and have no token."""
    starts: np.ndarray | None = None
    """Places at which documents begin, where the beginnings do not tell (rows that are blocks)."""


def encoded_documents(
    documents: Iterator[Document], pool: EncoderPool, batches_ahead: int | None = None
) -> Iterator[EncodedBatch]:
    """Token ids of the documents in order, EOS after each.

    At most ``batches_ahead`` batches (None: BATCHES_PER_WORKER a worker) are encoded ahead, of
    DOCUMENTS_AHEAD pieces and EPOCHS_AHEAD epochs together; before the first few batches are taken, fewer,
    so that the first step waits little.
    """
    pieces = taken = 0
    most = BATCHES_PER_WORKER * pool.workers if batches_ahead is None else batches_ahead
    previous: Mark = ()  # of the document that the next batch to be taken goes on with
    ahead: deque[tuple[int, Future[EncodedTexts], list[tuple[int, Mark]]]] = deque()
    for texts, last, marks in text_batches(documents):
        ahead.append((len(texts), pool.submit(texts, last), marks))
        pieces += len(texts)
        newest = marks[-1][1][0] if marks else 0
        while (
            len(ahead) > min(most, 2 * taken + 1)
            or pieces > DOCUMENTS_AHEAD
            or (ahead and ahead[0][2] and newest - ahead[0][2][0][1][0] > EPOCHS_AHEAD)
        ):
            count, future, its_marks = ahead.popleft()
            pieces -= count
            taken += 1
            yield _finished(future, its_marks, previous)
            previous = its_marks[-1][1] if its_marks else previous
    for _, future, marks in ahead:
        yield _finished(future, marks, previous)
        previous = marks[-1][1] if marks else previous


def _finished(future: Future[EncodedTexts], marks: list[tuple[int, Mark]], previous: Mark) -> EncodedBatch:
    """The batch; ``previous`` marks the document that it may begin in the middle of."""
    unencodable: list[tuple[Mark, str]] = []
    try:
        ids, lengths = future.result()
    except UnencodableError as error:
        ids, lengths = error.ids, error.lengths
        for index, reason in sorted(error.reasons.items()):
            before = [mark for piece, mark in marks if piece <= index]
            unencodable.append((before[-1] if before else previous, reason))
    starts = [0, *np.cumsum(lengths).tolist()]
    return EncodedBatch(ids, [(starts[piece], 0, mark) for piece, mark in marks], unencodable)


def text_batches(
    documents: Iterator[Document],
) -> Iterator[tuple[list[str], list[bool], list[tuple[int, Mark]]]]:
    """(texts, whether each ends its document, [(text index, mark)]) of about BATCH_CHARACTERS, with costs."""
    texts: list[str] = []
    last: list[bool] = []
    marks: list[tuple[int, Mark]] = []
    first_epoch = 0
    size, limit = 0, min(FIRST_BATCH_CHARACTERS, BATCH_CHARACTERS)
    for document in documents:
        marks.append((len(texts), document.mark()))
        size += DOCUMENT_COST
        assert not isinstance(document.text, TokenRow)
        first_epoch = document.epoch if len(marks) == 1 else first_epoch
        for piece, ends in text_pieces(document.text):
            texts.append(piece)
            last.append(ends)
            size += len(piece)
            if size >= limit or document.epoch - first_epoch >= EPOCHS_PER_BATCH:
                yield texts, last, marks
                texts, last, marks, size = [], [], [], 0
                limit = min(2 * limit, BATCH_CHARACTERS)
    if texts:
        yield texts, last, marks
