"""Documents of a run's data by their text or their place, read without tokenizing."""

from __future__ import annotations

from collections.abc import Iterator

from argonne.config.recipe import Recipe
from argonne.data.documents import DocumentReader
from argonne.data.excluded import Text
from argonne.data.position import DataPosition
from argonne.data.shards import Shard
from argonne.data.source import SourceOptions
from argonne.data.texts import LongText
from argonne.errors import ConfigError
from argonne.tools.document_sights import Wanted, number_of
from argonne.tools.document_steps import open_parts


def _reader(options: SourceOptions, shards: list[Shard], position: DataPosition) -> DocumentReader:
    """The documents of a source in their natural order, once."""
    skip = options.skip_bad_shards
    return DocumentReader(shards, options.column, position, skip, epochs=1, holdout=options.part)


def _sources(recipe: Recipe) -> Iterator[tuple[str, SourceOptions, list[Shard]]]:
    for stage in recipe.stages:
        yield from ((name, *part) for name, part in open_parts(stage.config).items())


def sources_with(recipe: Recipe, wanted: Wanted) -> dict[str, Text]:
    """The text of a row in each source whose document it is: not null, not empty, not held out.

    Reads no more than one row group of each source that has the shard.
    """
    assert wanted.row is not None
    found: dict[str, Text] = {}
    for name, options, shards in _sources(recipe):
        number = number_of(shards, wanted.shard)
        if number is None or wanted.row >= shards[number].rows or wanted.source not in (None, name):
            continue
        position = DataPosition(file_index=number, file_name=wanted.shard, row=wanted.row)
        first = next(iter(_reader(options, shards, position)), None)
        if first is not None and (first.file_index, first.row) == (number, wanted.row):
            found.setdefault(name, first.text)
    return found


def documents_with(recipe: Recipe, text: str) -> list[Wanted]:
    """The rows, each once, in the order of the data. Raises ConfigError for a source of token ids."""
    found: dict[Wanted, None] = {}
    for name, part, shards in _sources(recipe):
        if part.token_column is not None:
            raise ConfigError("the run reads token ids, which hold no text (--text): give --document")
        for document in _reader(part, shards, DataPosition()):
            held = document.text
            whole = "".join(held.stretches()) if isinstance(held, LongText) else str(held)
            if text in whole:
                found[Wanted(shards[document.file_index].name, document.row, name)] = None
    return list(found)
