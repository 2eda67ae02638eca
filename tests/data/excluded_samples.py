"""Streams with documents left out, by lists of Python integers alone, and lists of such documents."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.data.naive import Row, ids_of

Place = tuple[str, int]
"""(file name, row)"""


class Token(NamedTuple):
    """One token of the stream, and the document it is of."""

    id: int
    place: Place


def write_list(path: Path, places: Iterable[Place], **more: Any) -> Path:
    """A list of documents as JSON lines; ``more``: of each."""
    lines = [json.dumps({**more, "file": file, "row": row}) for file, row in places]
    path.write_text("# a list\n\n" + "\n".join(lines) + "\n")
    return path


def tokens_of(rows: Iterable[Row], tokenizer: Any, without: Iterable[Place] = ()) -> list[list[Token]]:
    """The tokens of each document of some rows."""
    left_out = set(without)
    return [
        [Token(token, (name, row)) for token in ids_of(text, tokenizer)]
        for name, row, text in rows
        if text and (name, row) not in left_out
    ]


class Packed:
    """The packed stream of some documents, again and again, of which more are left out from a sample on."""

    def __init__(self, epochs: Callable[[int], list[list[Token]]], size: int) -> None:
        self._epochs, self._size = epochs, size
        self._tokens: list[Token] = []
        self._epoch = 0
        self._without: set[Place] = set()

    def _fill(self, count: int) -> None:
        while len(self._tokens) < count:
            for document in self._epochs(self._epoch):
                self._tokens += [token for token in document if token.place not in self._without]
            self._epoch += 1

    def take(self, samples: int) -> list[list[int]]:
        """The next samples."""
        self._fill(samples * self._size + 1)
        size = self._size
        found = [[token.id for token in self._tokens[n * size : n * size + size + 1]] for n in range(samples)]
        self._tokens = self._tokens[samples * size :]
        return found

    def leave_out(self, places: Iterable[Place]) -> None:
        self._without |= set(places)
        self._tokens = [token for token in self._tokens if token.place not in self._without]


def windows_of(document: Sequence[Token], size: int) -> list[list[Token]]:
    """--no-packing: a document cut alone."""
    return [list(document[at : at + size + 1]) for at in range(0, len(document) - size, size)]


def blocks_of(documents: Sequence[Sequence[Token]], size: int) -> list[list[Token]]:
    """--no-streaming: the blocks of one pass of the packed stream."""
    flat = [token for document in documents for token in document]
    return [flat[at : at + size + 1] for at in range(0, len(flat) - size, size)]


def shuffled_blocks(blocks: Sequence[list[Token]], seed: int) -> Iterator[tuple[int, list[Token]]]:
    """(epoch, block) in the order of --no-streaming."""
    epoch = 0
    while True:
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(blocks))
        yield from ((epoch, blocks[number]) for number in order)
        epoch += 1


def ids(window: Sequence[Token]) -> list[int]:
    return [token.id for token in window]


def holds(window: Sequence[Token], places: Iterable[Place]) -> bool:
    wanted = set(places)
    return any(token.place in wanted for token in window)
