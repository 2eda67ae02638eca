"""Documents of a run's data by their text or their place, read without tokenizing."""

from __future__ import annotations

from collections.abc import Iterator

from argonne.config.recipe import Recipe
from argonne.data.documents import DocumentReader
from argonne.data.position import DataPosition
from argonne.data.shards import Shard
from argonne.data.source import SourceOptions
from argonne.data.texts import LongText
from argonne.errors import ConfigError
from argonne.tools.document_steps import Wanted, open_parts


def _reader(options: SourceOptions, shards: list[Shard], position: DataPosition) -> DocumentReader:
    """The documents of a source in their natural order, once."""
    skip = options.skip_bad_shards
    return DocumentReader(shards, options.column, position, skip, epochs=1, holdout=options.part)


def _sources(recipe: Recipe) -> Iterator[tuple[SourceOptions, list[Shard]]]:
    for stage in recipe.stages:
        yield from open_parts(stage.config).values()


def is_document(recipe: Recipe, wanted: Wanted) -> bool:
    """Whether the row is a document that the run trains on: not null, not empty, not held out.

    Reads no more than one row group of each source that has the shard.
    """
    assert wanted.row is not None
    for options, shards in _sources(recipe):
        for number, shard in enumerate(shards):
            if shard.name == wanted.shard and wanted.row < shard.rows:
                position = DataPosition(file_index=number, file_name=shard.name, row=wanted.row)
                first = next(iter(_reader(options, shards, position)), None)
                if first is not None and (first.file_index, first.row) == (number, wanted.row):
                    return True
    return False


def documents_with(recipe: Recipe, text: str) -> list[Wanted]:
    """The rows, each once, in the order of the data. Raises ConfigError for a source of token ids."""
    found: dict[Wanted, None] = {}
    for part, shards in _sources(recipe):
        if part.token_column is not None:
            raise ConfigError("the run reads token ids, which hold no text (--text): give --document")
        for document in _reader(part, shards, DataPosition()):
            held = document.text
            whole = "".join(held.stretches()) if isinstance(held, LongText) else str(held)
            if text in whole:
                found[Wanted(shards[document.file_index].name, document.row)] = None
    return list(found)
