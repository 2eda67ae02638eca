"""Token ids of the documents, made ahead of need: the stream that samplers.py cuts into samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple, TypeAlias

import numpy as np

from argonne.data.documents import DOCUMENT_COST, Document, Mark
from argonne.data.encoder_pool import EncoderPool
from argonne.data.token_rows import TokenRow
from argonne.data.tokenizer import text_pieces

BATCH_CHARACTERS = 1 << 19
"""Text handed to one tokenizing worker at a time, characters."""
FIRST_BATCH_CHARACTERS = 1 << 13
"""The first batch is this small and each next one twice as large, so that the first step waits little."""
BATCHES_PER_WORKER = 2
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
    starts: np.ndarray | None = None
    """Places at which documents begin, where the beginnings do not tell (rows that are blocks)."""


def encoded_documents(
    documents: Iterator[Document], pool: EncoderPool, batches_ahead: int | None = None
) -> Iterator[EncodedBatch]:
    """Token ids of the documents in order, EOS after each.

    At most ``batches_ahead`` batches (None: BATCHES_PER_WORKER a worker) are encoded ahead, of
    DOCUMENTS_AHEAD pieces together.
    """
    pieces = 0
    most = BATCHES_PER_WORKER * pool.workers if batches_ahead is None else batches_ahead
    ahead: deque[tuple[int, Future[EncodedTexts], list[tuple[int, Mark]]]] = deque()
    for texts, last, marks in text_batches(documents):
        ahead.append((len(texts), pool.submit(texts, last), marks))
        pieces += len(texts)
        while len(ahead) > most or pieces > DOCUMENTS_AHEAD:
            count, future, its_marks = ahead.popleft()
            pieces -= count
            yield _finished(future, its_marks)
    for _, future, marks in ahead:
        yield _finished(future, marks)


def _finished(future: Future[EncodedTexts], marks: list[tuple[int, Mark]]) -> EncodedBatch:
    ids, lengths = future.result()
    starts = [0, *np.cumsum(lengths).tolist()]
    return EncodedBatch(ids, [(starts[piece], 0, mark) for piece, mark in marks])


def text_batches(
    documents: Iterator[Document],
) -> Iterator[tuple[list[str], list[bool], list[tuple[int, Mark]]]]:
    """(texts, whether each ends its document, [(text index, mark)]) of about BATCH_CHARACTERS, with costs."""
    texts: list[str] = []
    last: list[bool] = []
    marks: list[tuple[int, Mark]] = []
    size, limit = 0, min(FIRST_BATCH_CHARACTERS, BATCH_CHARACTERS)
    for document in documents:
        marks.append((len(texts), document.mark()))
        size += DOCUMENT_COST
        assert not isinstance(document.text, TokenRow)
        for piece, ends in text_pieces(document.text):
            texts.append(piece)
            last.append(ends)
            size += len(piece)
            if size >= limit:
                yield texts, last, marks
                texts, last, marks, size = [], [], [], 0
                limit = min(2 * limit, BATCH_CHARACTERS)
    if texts:
        yield texts, last, marks
