"""prepare_data.py --tokenize: texts to shards of token ids, in parallel, going on after a kill.

Each finished shard is on the disk before the journal vouches for it; started again on the same inputs with
the same settings, the work goes on behind the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from argonne.errors import ConfigError, DataError, RunError
from argonne.files import synchronize
from argonne.tools.output_folder import check_output, publish
from argonne.tools.shard_writer import MIB, SURROGATES
from argonne.tools.token_writer import (
    TOKEN_COLUMN,
    FlatShard,
    ListShard,
    TokenShard,
    id_type,
    remove_from,
    shard_path,
)

if TYPE_CHECKING:
    from argonne.data.documents import Document
    from argonne.data.stream import EncodedBatch

JOURNAL = "journal.json"
SETTINGS = ("token_format", "shard_mib", "row_group_mib", "compression", "text_field", "document", "format")


@dataclass
class Place:
    """What is done: whole shards, and the document after them."""

    settings: str
    """Hash of inputs, tokenizer and settings."""
    shards: int = 0
    documents: int = 0
    tokens: int = 0
    file_index: int = 0
    row: int = 0


def tokenize(options: argparse.Namespace, kind: str, files: Sequence[Path]) -> str:
    """Write the shards of token ids; returns what there is now, in two lines."""
    from argonne.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(options.tokenize, options.trust_remote_code)
    source = _source(options, kind, files)
    content = [source.identity, tokenizer_fingerprint(tokenizer), [getattr(options, k) for k in SETTINGS]]
    settings = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    check_output(options.output_dir, files, options.overwrite)
    output = options.output_dir.resolve()
    partial = output.with_name(
        f".{output.name}.tokenizing"
    )  # kept where the work is cut off, for the next run
    try:
        place = _begun(partial, settings)
        remove_from(partial, place.shards, options.token_format)
        _write(options, tokenizer, source, partial, place)
        if place.documents == 0:
            raise DataError("the inputs hold no text: nothing was written")
        (partial / JOURNAL).unlink(missing_ok=True)
        publish(partial, output)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = f"cannot write {partial}: {error.strerror or error}"
        raise RunError(f"{reason}: free space and run it again, or give another --output-dir") from error
    flat = options.token_format == "bin"
    flags = f"'{options.output_dir}/*.bin'" if flat else f"'{options.output_dir}/*.parquet'"
    flags += "" if flat else f" --token-column {TOKEN_COLUMN}"
    return (
        f"{place.documents:,} documents, {place.tokens:,} tokens in {place.shards} shards\n"
        f"train on them with --data-glob {flags}"
    )


def _begun(partial: Path, settings: str) -> Place:
    """Where an earlier attempt at the same work stopped; the beginning, in an empty folder, without one."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        place = Place(**json.loads((partial / JOURNAL).read_text(encoding="utf-8")))
        if place.settings == settings:
            return place
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return Place(settings=settings)


def _vouch(partial: Path, place: Place) -> None:
    """Write down what is done, once its shards are on the disk."""
    temporary = partial / f"{JOURNAL}.tmp"
    temporary.write_text(json.dumps(asdict(place)), encoding="utf-8")
    synchronize(temporary)
    os.replace(temporary, partial / JOURNAL)
    synchronize(partial)


@dataclass(frozen=True)
class _Source:
    """The documents of the inputs from any place on."""

    identity: Any
    total: int | None
    """Rows, where they are known."""
    documents: Callable[[Place], Iterator[Document]]


def _source(options: argparse.Namespace, kind: str, files: Sequence[Path]) -> _Source:
    from argonne.data.find_shards import SHARD_SUFFIXES, natural_key
    from argonne.data.flat_tokens import is_flat

    shards = [path for path in files if path.suffix in SHARD_SUFFIXES]
    if flat := next((path for path in shards if is_flat(path)), None):
        raise ConfigError(f"{flat} is a flat token file: train on it as it is, with --data-glob")
    if kind == "files" and shards:
        if len(shards) < len(files):
            other = next(path for path in files if path not in shards)
            raise ConfigError(f"{shards[0]} is a shard and {other} is not: tokenize them one after the other")
        return _shard_source(options, sorted(shards, key=natural_key))
    identity = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return _Source([kind, identity], None, lambda place: _raw_documents(options, kind, files, place))


def _shard_source(options: argparse.Namespace, paths: Sequence[Path]) -> _Source:
    from argonne.data.documents import DocumentReader
    from argonne.data.find_shards import Found
    from argonne.data.position import DataPosition
    from argonne.data.shards import check_shards, manifest

    shards = check_shards([Found(path, path.name) for path in paths], options.text_field)
    rows_before = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()

    def documents(place: Place) -> Iterator[Document]:
        start = DataPosition(file_index=place.file_index, row=place.row)
        return iter(DocumentReader(shards, options.text_field, start, epochs=1))

    return _Source(["shards", manifest(shards)], rows_before[-1], documents)


def _raw_documents(
    options: argparse.Namespace, kind: str, files: Sequence[Path], place: Place
) -> Iterator[Document]:
    """The documents of raw files as `prepare_data.py` reads them, behind those that are done."""
    from argonne.data.documents import Counts, Document
    from argonne.tools.raw_documents import dataset_texts, file_texts

    tally, bar = SimpleNamespace(skipped=0), SimpleNamespace(n=0, update=lambda _: None)
    texts: Any = (
        dataset_texts(files[0], options)
        if kind == "datasets"
        else (text for path in files for text in file_texts(path, options, tally, bar))  # type: ignore[arg-type]
    )
    found = (SURROGATES.sub("\ufffd", text) for text in texts if text)
    for number, text in enumerate(found):
        if number >= place.documents:
            yield Document(0, 0, number, text, Counts(), 0)


def _write(options: argparse.Namespace, tokenizer: Any, source: _Source, partial: Path, place: Place) -> None:
    """Tokenize what is not done yet; ``place`` advances with every finished shard."""
    from tqdm import tqdm

    from argonne.data.encoder_pool import EncoderPool
    from argonne.data.stream import encoded_documents
    from argonne.data.tokenizer import EncoderRecipe

    recipe = EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code)
    dtype = id_type(max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())))
    shard: TokenShard | None = None
    pool = EncoderPool(recipe, options.num_proc)
    try:
        batches = encoded_documents(source.documents(place), pool)
        with tqdm(
            total=source.total, initial=place.documents, desc="Tokenizing", unit="docs", disable=None
        ) as bar:
            for (_, file_index, row, *_), ids in whole_documents(batches):
                if shard is None:
                    path = shard_path(partial, place.shards, options.token_format)
                    shard = _new_shard(path, dtype, options)
                shard.add(ids)
                place.documents += 1
                place.tokens += len(ids)
                place.file_index, place.row = file_index, row + 1
                bar.update(1)
                if shard.size >= options.shard_mib * MIB:
                    _finish(shard, partial, place)
                    shard = None
        if shard is not None:
            _finish(shard, partial, place)
    finally:
        pool.close()


def _new_shard(path: Path, dtype: np.dtype[Any], options: argparse.Namespace) -> TokenShard:
    if options.token_format == "bin":
        return FlatShard(path, dtype)
    return ListShard(path, dtype, options.row_group_mib * MIB, options.compression)


def _finish(shard: TokenShard, partial: Path, place: Place) -> None:
    shard.close()
    place.shards += 1
    _vouch(partial, place)


def whole_documents(batches: Iterator[EncodedBatch]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(mark, ids) of each document, put together where it lies in several batches."""
    mark: tuple[int, ...] | None = None
    parts: list[np.ndarray] = []
    for batch in batches:
        begun = 0
        for place, _, next_mark in batch.beginnings:
            parts.append(batch.ids[begun:place])
            if mark is not None:
                yield mark, np.concatenate(parts)
            mark, parts, begun = next_mark, [], place
        parts.append(batch.ids[begun:])
    if mark is not None:
        yield mark, np.concatenate(parts)
