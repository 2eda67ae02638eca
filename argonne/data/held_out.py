"""Validation sets: the first samples of a packed stream, and the bytes of the text they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from argonne.data.documents import Document, DocumentReader
from argonne.data.encoder_pool import EncoderPool
from argonne.data.find_shards import as_globs, find_shards
from argonne.data.holdout import Holdout
from argonne.data.mixture import naming
from argonne.data.position import DataPosition
from argonne.data.shards import Shard
from argonne.data.source import SourceOptions
from argonne.data.stream import EncodedBatch, encoded_documents
from argonne.data.token_rows import TokenRow
from argonne.data.token_stream import open_shards, source_by_columns, token_batches, with_vocabulary
from argonne.data.tokenizer import EncoderRecipe, text_pieces
from argonne.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """The first samples of a validation set."""

    name: str
    tokens: np.ndarray
    """(samples, block_size + 1) int32"""
    text_bytes: int
    """UTF-8 bytes of the documents that the samples touch, each time that they do; where their ids are
    given, of the decoded samples"""


def read_held_out(
    name: str, data_glob: str | Sequence[str], options: SourceOptions, tokenizer: Any, samples: int
) -> HeldOutSet:
    """The first ``samples`` of the packed stream of ``data_glob``; a small set is repeated, as in training.

    Column, block size, workers and bad shards are those of ``options``, the training data's. With
    ``--holdout`` a set of shards that are trained on is their held-out documents. Raises DataError naming
    the set.
    """
    trained = [part.glob for part in options.mix] or list(as_globs(options.data_glob))
    try:
        options = source_by_columns(options, data_glob)
        return _read(name, options, trained, tokenizer, samples)
    except DataError as error:
        raise _of_set(name, error) from error


def check_data(options: SourceOptions, held_out: tuple[str, str] | None = None) -> None:
    """DataError unless the shards of the options, or of the set (name, glob) ``held_out``, can be opened."""
    if held_out is not None:
        try:
            open_shards(_whole(source_by_columns(options, held_out[1])))
        except DataError as error:
            raise _of_set(held_out[0], error) from error
        return
    for part in options.mix:
        with naming(part.name):
            open_shards(source_by_columns(options, part.glob))
    if not options.mix:
        open_shards(options)


def _whole(options: SourceOptions) -> SourceOptions:
    """A validation set is packed and read whole, whatever the training does."""
    return replace(options, packing=True, holdout=None)


def _of_set(name: str, error: DataError) -> DataError:
    return DataError(f"--eval-data {name}: {str(error).replace('--data-glob', '--eval-data')}")


def _part(shards: list[Shard], trained: Sequence[str], options: SourceOptions) -> Holdout | None:
    """The held-out part where the shards are trained on; DataError where only some are."""
    if options.holdout is None:
        return None
    known = {_place(found.path) for found in find_shards(trained, options.remote_cache)}
    shared = sum(_place(shard.path) in known for shard in shards)
    if not shared:
        return None
    if shared < len(shards):
        raise DataError(
            f"{shared} of {len(shards)} shards are trained on, and --holdout leaves only their held-out "
            "documents: name the shards of training, or others, not both (--data-glob)"
        )
    return Holdout(every=options.holdout, held_out=True)


def _place(path: Any) -> str:
    return str(path.resolve()) if isinstance(path, Path) else str(path)


def _read(name: str, options: SourceOptions, trained: list[str], tokenizer: Any, samples: int) -> HeldOutSet:
    asked = options
    options = _whole(with_vocabulary(options, tokenizer))
    options, shards = open_shards(options)
    start = DataPosition(file_name=shards[0].name, block_size=options.block_size)
    part = _part(shards, trained, asked)
    documents = DocumentReader(shards, options.column, start, options.skip_bad_shards, holdout=part)
    wanted = samples * options.block_size + 1
    if options.token_column is not None:
        batches = token_batches(iter(documents), start, int(tokenizer.eos_token_id))
        stream = np.concatenate([batch.ids for batch in _first(batches, wanted)])
        text = tokenizer.decode(stream[:wanted], skip_special_tokens=True)
        text_bytes = len(text.encode("utf-8", "replace"))
    else:
        stream, text_bytes = _tokenized(documents, options, tokenizer, wanted)
    tokens = np.empty((samples, options.block_size + 1), dtype=np.int32)
    tokens[:, :-1] = stream[: wanted - 1].reshape(samples, options.block_size)
    tokens[:, 1:] = stream[1:wanted].reshape(samples, options.block_size)
    return HeldOutSet(name=name, tokens=tokens, text_bytes=text_bytes)


def _tokenized(
    documents: DocumentReader, options: SourceOptions, tokenizer: Any, wanted: int
) -> tuple[np.ndarray, int]:
    """At least the ``wanted`` first ids of a source of text, and the bytes of the documents they touch."""
    sizes: dict[tuple[int, int, int], int] = {}
    pool = EncoderPool(
        EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code), options.num_proc
    )
    chunks, filled, text_bytes = [], 0, 0
    try:
        for batch in _first(encoded_documents(_measured(iter(documents), sizes), pool), wanted):
            for place, _, mark in batch.beginnings:
                if filled + place < wanted:
                    text_bytes += sizes[mark[0], mark[1], mark[2]]
            chunks.append(batch.ids)
            filled += len(batch.ids)
    finally:
        pool.close()
    return np.concatenate(chunks), text_bytes


def _first(batches: Iterator[EncodedBatch], wanted: int) -> Iterator[EncodedBatch]:
    """The batches up to the one that has the last of the ``wanted`` first ids."""
    filled = 0
    for batch in batches:
        yield batch
        filled += len(batch.ids)
        if filled >= wanted:
            return


def _measured(documents: Iterator[Document], sizes: dict[tuple[int, int, int], int]) -> Iterator[Document]:
    """The documents, with the UTF-8 bytes of each in ``sizes`` by (epoch, file, row)."""
    for document in documents:
        assert not isinstance(document.text, TokenRow)
        size = sum(len(piece.encode("utf-8", "replace")) for piece, _ in text_pieces(document.text))
        sizes[document.epoch, document.file_index, document.row] = size
        yield document
