"""The stream, the shuffled order and the mixture, read once more from their definitions alone.

Lists of Python integers and no code of the suite.
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

Row = tuple[str, int, str | None]
"""(file name, row, text)"""


def groups_of(folder: Path) -> list[tuple[str, list[list[Row]]]]:
    """(file name, its row groups) in the order of the names, which have equally many digits."""
    files = []
    for path in sorted(folder.glob("*.parquet")):
        file, first, groups = pq.ParquetFile(path), 0, []
        for number in range(file.num_row_groups):
            texts = file.read_row_group(number)["text"].to_pylist()
            groups.append([(path.name, first + row, text) for row, text in enumerate(texts)])
            first += len(texts)
        files.append((path.name, groups))
    return files


def natural_rows(folder: Path) -> list[Row]:
    return [row for _, groups in groups_of(folder) for group in groups for row in group]


def shuffled_rows(folder: Path, seed: int, epoch: int) -> list[Row]:
    """The rows of an epoch with --shuffle."""
    files, rows = groups_of(folder), []
    shards = np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) | 0xFFFFFFFF]))
    for i in shards.permutation(len(files)):
        order = np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) | int(i)]))
        for group in order.permutation(len(files[i][1])):
            rows += [files[i][1][group][row] for row in order.permutation(len(files[i][1][group]))]
    return rows


def is_held_out(text: str, every: int) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % every == 0


def ids_of(text: str, tokenizer: Any) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


class Stream:
    """The tokens of one source from its start, epoch after epoch."""

    def __init__(self, folder: Path, tokenizer: Any, seed: int | None = None) -> None:
        """``seed``: of the shuffled order; None: rows as they lie."""
        self._epochs = self._rows(folder, seed)
        self._tokenizer = tokenizer
        self.tokens: list[int] = []
        self.places: list[tuple[int, str, int, int]] = []
        """(epoch, file name, row, token) of each token."""

    @staticmethod
    def _rows(folder: Path, seed: int | None) -> Iterator[tuple[int, list[Row]]]:
        epoch = 0
        while True:
            yield epoch, natural_rows(folder) if seed is None else shuffled_rows(folder, seed, epoch)
            epoch += 1

    def sample(self, number: int, block_size: int) -> list[int]:
        end = (number + 1) * block_size + 1
        while len(self.tokens) < end:
            epoch, rows = next(self._epochs)
            for name, row, text in rows:
                if text:
                    ids = ids_of(text, self._tokenizer)
                    self.places += [(epoch, name, row, token) for token in range(len(ids))]
                    self.tokens += ids
        return self.tokens[number * block_size : end]


def mixture_order(weights: Sequence[str], count: int) -> list[int]:
    """The source of each of the first ``count`` samples, straight from the definition."""
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    order: list[int] = []
    for n in range(1, count + 1):
        due = [share * n - order.count(number) for number, share in enumerate(shares)]
        order.append(next(number for number, value in enumerate(due) if value == max(due)))
    return order
