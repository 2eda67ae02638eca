"""What a plan reads of each source, about how much is there, and the files that a run must have."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from argonne.config.options import DataOptions, RunConfig
from argonne.errors import DataError
from data_stream import Exclusion, find_shards

TEXT_BYTES_PER_TOKEN = 4.5
"""Of English text with a vocabulary of 150,000; a guess until the text is tokenized."""
_FOOTERS_READ = 32
_FLAT_HEADER = struct.Struct("<3i")
_FLAT_MAGIC = 20240520


@dataclass(frozen=True, kw_only=True)
class Held:
    """What lies at some globs."""

    shards: int
    tokens: float
    """Of all shards, from the footers of some of them."""
    guessed: bool
    """Tokens are guessed from bytes of text."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a run reads of one source."""

    name: str
    """"" of the only source."""
    globs: tuple[str, ...]
    tokens: int
    held: Held | None
    """None: nothing is there, or not in a form whose tokens a footer tells, or it is a URL."""

    @property
    def epochs(self) -> float | None:
        return self.tokens / self.held.tokens if self.held is not None and self.held.tokens else None


def require_files(configs: Sequence[RunConfig]) -> None:
    """Raises the run's own RunError where a list of excluded documents cannot be read. Data may lie
    elsewhere: the plan's text says so.
    """
    for path in dict.fromkeys(config.data.exclude_documents for config in configs):
        if path is not None:
            Exclusion.read(Path(path))


def validation_sets(configs: Sequence[RunConfig]) -> Iterator[tuple[str, str]]:
    """(name, where its shards are) of each set of any stage; a URL is not asked."""
    for name, glob in dict.fromkeys(one for config in configs for one in config.evaluation.eval_data):
        if "://" in glob:
            yield name, glob
            continue
        try:
            yield name, f"{len(find_shards(glob)):,} of {glob}"
        except DataError:
            yield name, f"none at {glob}"


def readings(stages: Iterable[tuple[DataOptions, int]]) -> list[Reading]:
    """What each source gives, over stages of so many tokens; one whose globs change is listed by them."""
    tokens: dict[tuple[str, tuple[str, ...]], Fraction] = {}
    first: dict[tuple[str, tuple[str, ...]], DataOptions] = {}
    for data, count in stages:
        for name, globs, share in _shares(data):
            tokens[name, globs] = tokens.get((name, globs), Fraction(0)) + share * count
            first.setdefault((name, globs), data)
    return [
        Reading(name=name, globs=globs, tokens=round(count), held=held(globs, first[name, globs]))
        for (name, globs), count in tokens.items()
    ]


def _shares(data: DataOptions) -> Iterator[tuple[str, tuple[str, ...], Fraction]]:
    if not data.data_mix:
        yield "", tuple(data.data_glob), Fraction(1)
        return
    whole = sum((Fraction(source.weight) for source in data.data_mix), Fraction(0))
    for source in data.data_mix:
        yield source.name, (source.glob,), Fraction(source.weight) / whole


def held(globs: Sequence[str], data: DataOptions) -> Held | None:
    """By the footers of some shards; a URL is not asked."""
    if any("://" in glob for glob in globs):
        return None
    try:
        paths = [found.path for found in find_shards(globs) if isinstance(found.path, Path)]
    except DataError:
        return None
    flat = all(path.suffix == ".bin" for path in paths)
    guessed = not flat and data.token_column is None
    counts = []
    for path in paths[:: max(1, len(paths) // _FOOTERS_READ)]:
        count = _flat_tokens(path) if flat else _column_size(path, data)
        if count is not None:  # the run says which shard is broken
            counts.append(count / (TEXT_BYTES_PER_TOKEN if guessed else 1))
    if not any(counts):
        return None
    trained_on = 1.0 if data.holdout is None else 1 - 1 / data.holdout
    tokens = trained_on * sum(counts) * len(paths) / len(counts)
    return Held(shards=len(paths), tokens=tokens, guessed=guessed)


def _flat_tokens(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            magic, _, count = _FLAT_HEADER.unpack(file.read(_FLAT_HEADER.size))
    except (OSError, struct.error):
        return None
    return int(count) if magic == _FLAT_MAGIC else None


def _column_size(path: Path, data: DataOptions) -> int | None:
    """Bytes of the text column of a parquet file, uncompressed, or ids of its token column."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix != ".parquet":
        return None
    try:
        footer = pyarrow.parquet.ParquetFile(path).metadata
    except (OSError, pyarrow.ArrowException):
        return None
    wanted = data.token_column or data.text_column
    size = 0
    for group in range(footer.num_row_groups):
        for index in range(footer.num_columns):
            column = footer.row_group(group).column(index)
            if data.token_column is not None and column.path_in_schema.split(".")[0] == wanted:
                size += column.num_values
            elif column.path_in_schema == wanted:
                size += column.total_uncompressed_size
    return size
