"""Validation sets: the first samples of a packed stream, and the bytes of the text they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from argonne.data.documents import Document, DocumentReader
from argonne.data.encoder_pool import EncoderPool
from argonne.data.find_shards import as_globs, find_shards
from argonne.data.holdout import Holdout
from argonne.data.mixture import naming
from argonne.data.position import DataPosition
from argonne.data.shards import Shard, open_corpus
from argonne.data.source import SourceOptions, refuse_unencodable
from argonne.data.stream import encoded_documents
from argonne.data.tokenizer import EncoderRecipe, text_pieces
from argonne.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """The first samples of a validation set."""

    name: str
    tokens: np.ndarray
    """(samples, block_size + 1) int32"""
    text_bytes: int
    """UTF-8 bytes of the documents that the samples touch, each time that they do"""


def read_held_out(
    name: str, data_glob: str, options: SourceOptions, tokenizer: Any, samples: int
) -> HeldOutSet:
    """The first ``samples`` of the packed stream of ``data_glob``; a small set is repeated, as in training.

    Column, block size, workers and bad shards are those of ``options``, the training data's. With
    ``--holdout`` a set of shards that are trained on is their held-out documents. Raises DataError naming
    the set.
    """
    trained = [part.glob for part in options.mix] or as_globs(options.data_glob)
    options = replace(options, data_glob=data_glob)
    try:
        shards = _shards(data_glob, options)
        return _read(name, shards, _part(shards, trained, options), options, tokenizer, samples)
    except DataError as error:
        raise _of_set(name, error) from error


def check_data(options: SourceOptions, held_out: tuple[str, str] | None = None) -> None:
    """DataError unless the shards of the options, or of the set (name, glob) ``held_out``, can be opened."""
    if held_out is not None:
        try:
            _shards(held_out[1], options)
        except DataError as error:
            raise _of_set(held_out[0], error) from error
        return
    for part in options.mix:
        with naming(part.name):
            _shards(part.glob, options)
    if not options.mix:
        _shards(options.data_glob, options)


def _shards(data_glob: str | Sequence[str], options: SourceOptions) -> list[Shard]:
    return open_corpus(
        data_glob,
        options.text_column,
        skip_bad_shards=options.skip_bad_shards,
        cache_dir=options.cache_dir,
    )


def _of_set(name: str, error: DataError) -> DataError:
    return DataError(f"--eval-data {name}: {str(error).replace('--data-glob', '--eval-data')}")


def _part(shards: list[Shard], trained: Sequence[str], options: SourceOptions) -> Holdout | None:
    """The held-out part where the shards are trained on; DataError where only some are."""
    if options.holdout is None:
        return None
    known = {found.path.resolve() for found in find_shards(trained)}
    shared = sum(shard.path.resolve() in known for shard in shards)
    if not shared:
        return None
    if shared < len(shards):
        raise DataError(
            f"{shared} of {len(shards)} shards are trained on, and --holdout leaves only their held-out "
            "documents: name the shards of training, or others, not both (--data-glob)"
        )
    return Holdout(every=options.holdout, held_out=True)


def _read(
    name: str,
    shards: list[Shard],
    part: Holdout | None,
    options: SourceOptions,
    tokenizer: Any,
    samples: int,
) -> HeldOutSet:
    start = DataPosition(file_name=shards[0].name, block_size=options.block_size)
    sizes: dict[tuple[int, int, int], int] = {}
    documents = DocumentReader(shards, options.text_column, start, options.skip_bad_shards, holdout=part)
    pool = EncoderPool(
        EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code), options.num_proc
    )
    wanted = samples * options.block_size + 1
    chunks, filled, text_bytes = [], 0, 0
    try:
        for batch in encoded_documents(_measured(iter(documents), sizes), pool):
            for mark, reason in batch.unencodable:
                refuse_unencodable(Document.from_mark(mark), reason, shards, options.skip_bad_shards)
            without_ids = {mark for mark, _ in batch.unencodable}
            for place, _, mark in batch.beginnings:
                if filled + place < wanted and mark not in without_ids:
                    text_bytes += sizes[mark[0], mark[1], mark[2]]
            chunks.append(batch.ids)
            filled += len(batch.ids)
            if filled >= wanted:
                break
    finally:
        pool.close()
    stream = np.concatenate(chunks)
    tokens = np.empty((samples, options.block_size + 1), dtype=np.int32)
    tokens[:, :-1] = stream[: wanted - 1].reshape(samples, options.block_size)
    tokens[:, 1:] = stream[1:wanted].reshape(samples, options.block_size)
    return HeldOutSet(name=name, tokens=tokens, text_bytes=text_bytes)


def _measured(documents: Iterator[Document], sizes: dict[tuple[int, int, int], int]) -> Iterator[Document]:
    """The documents, with the UTF-8 bytes of each in ``sizes`` by (epoch, file, row)."""
    for document in documents:
        size = sum(len(piece.encode("utf-8", "replace")) for piece, _ in text_pieces(document.text))
        sizes[document.epoch, document.file_index, document.row] = size
        yield document
