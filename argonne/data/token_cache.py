"""--no-streaming: the corpus tokenized once into a memory-mapped file.

A cache is a folder named after a hash of everything its tokens depend on, so it is rebuilt when any of it
changed. It exists once its ``meta.json`` does; until then ``journal.json`` says how far the build came.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from argonne.data.documents import Counts, Document, DocumentReader, Mark, no_text
from argonne.data.encoder_pool import EncoderPool
from argonne.data.holdout import Holdout
from argonne.data.position import DataPosition
from argonne.data.shards import Shard
from argonne.data.source import (
    SourceOptions,
    refuse_unencodable,
    unencodable_skip,
)
from argonne.data.stream import EncodedBatch, encoded_documents
from argonne.data.token_rows import describe_column
from argonne.data.token_stream import token_batches
from argonne.data.tokenizer import PIECE_CHARACTERS, EncoderRecipe
from argonne.errors import DataError
from argonne.files import write_json_durably

CACHE_VERSION = 1
JOURNAL_SECONDS = 5.0
"""Time between two journal entries: what an interrupted build has to do again at most."""
FILES = {"tokens.bin": ("tokens", 4), "starts.bin": ("documents", 8), "rows.bin": ("documents", 8)}
"""Name -> (count in ``meta.json``, bytes of each)."""
ROW_BITS = 32


@dataclass(frozen=True, kw_only=True)
class TokenCache:
    """One pass of the packed stream."""

    tokens: np.ndarray
    """(tokens,) int32, memory-mapped."""
    starts: np.ndarray
    """(documents,) int64: where each document begins; memory-mapped."""
    rows: np.ndarray | None
    """(documents,) int64: `row_key` of each, ascending; memory-mapped. None: of an older version."""
    counts: Counts
    skipped: tuple[dict[str, Any], ...]
    blocks: bool = False
    """Rows are blocks of a stream: EOS ids end its documents."""


def row_key(file_index: int, row: int) -> int:
    """A row of the corpus as one number, ascending in the natural order."""
    return file_index << ROW_BITS | row


def cache_key(
    shards: Sequence[Shard],
    tokenizer: str,
    column: str,
    part: Holdout | None = None,
    excluded: Mapping[int, Collection[int]] | None = None,
) -> str:
    """Hash of everything that the cached tokens depend on (``tokenizer``: its fingerprint, EOS included)."""
    files = [[s.name, s.size, s.mtime_ns, s.digest, list(s.group_rows), s.fault] for s in shards]
    content = [CACHE_VERSION, files, tokenizer, column, PIECE_CHARACTERS]
    if part is not None:
        content.append([part.every, part.held_out])
    if excluded:
        content.append({"excluded": [[number, sorted(rows)] for number, rows in sorted(excluded.items())]})
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def cache_folder(shards: Sequence[Shard], tokenizer: str, options: SourceOptions) -> Path:
    """Where the token cache of a corpus lies, or would."""
    assert options.cache_dir is not None
    key = cache_key(shards, tokenizer, describe_column(options.column), options.part, options.excluded)
    return options.cache_dir / f"tokens-{key}"


def find_cache(shards: Sequence[Shard], tokenizer: str, options: SourceOptions) -> TokenCache:
    """The token cache of a corpus; DataError where it is not there whole."""
    folder = cache_folder(shards, tokenizer, options)
    try:
        return _mapped(folder)
    except OSError as error:
        raise DataError(
            f"the token cache {folder} is not there ({error.strerror}), and the order of --no-streaming is "
            "known from it alone: restore it, or name its folder with --data-cache-dir"
        ) from error


def open_cache(
    shards: list[Shard], recipe: EncoderRecipe, tokenizer: str, options: SourceOptions
) -> TokenCache:
    """The token cache of a corpus, built first where it is missing or unfinished."""
    folder = cache_folder(shards, tokenizer, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            _lock(lock, folder)
            if not (folder / "meta.json").exists():
                _Build(folder, shards, recipe, options).run()
            cache = _mapped(folder)
    except OSError as error:
        reason = f"cannot keep the token cache in {folder}: {error}"
        raise DataError(f"{reason}: free space there, or leave --no-streaming out") from error
    _refuse_skips(cache.skipped, folder, options)
    return cache


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        tqdm.write(f"waiting for another run that makes the token cache {folder}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _refuse_skips(skipped: Sequence[Mapping[str, Any]], folder: Path, options: SourceOptions) -> None:
    """What a build with --skip-bad-shards left out is not for a run without it."""
    if skipped and not options.skip_bad_shards:
        first = skipped[0]
        raise DataError(
            f"the token cache {folder} lacks {len(skipped)} row groups or shards that could not be read (the "
            f"first in {first['file_name']}: {first['reason']}): repair the shards, remove the folder if "
            "they are sound, or --skip-bad-shards"
        )


def _mapped(folder: Path) -> TokenCache:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    has_rows = (folder / "rows.bin").exists()
    for name, size in _sizes(meta).items():
        if (has_rows or name != "rows.bin") and (folder / name).stat().st_size != size:
            raise DataError(
                f"the token cache {folder} is damaged ({name} is not {size} bytes): remove the folder"
            )
    return TokenCache(
        tokens=np.memmap(folder / "tokens.bin", np.int32, "r"),
        starts=np.memmap(folder / "starts.bin", np.int64, "r"),
        rows=np.memmap(folder / "rows.bin", np.int64, "r") if has_rows else None,
        counts=Counts(**meta["counts"]),
        skipped=tuple(meta["skipped"]),
        blocks=bool(meta.get("blocks")),
    )


def _sizes(place: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each file by the counts in ``meta.json`` or the journal."""
    return {name: int(place[count]) * each for name, (count, each) in FILES.items()}


class _Build:
    """Tokenizes the corpus into a cache folder, from where the journal says an earlier build stopped."""

    def __init__(
        self, folder: Path, shards: list[Shard], recipe: EncoderRecipe, options: SourceOptions
    ) -> None:
        self._folder = folder
        self._shards = shards
        self._recipe = recipe
        self._options = options
        self._place = self._vouched()
        self._blocks = bool(self._place.get("blocks"))
        self._unencodable: list[tuple[int, dict[str, Any]]] = []
        """(documents before it, entry of the skips) of each document without token ids, in this build."""

    def _vouched(self) -> dict[str, Any]:
        """What the journal says, if the files hold it; otherwise the very beginning."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            place = json.loads((self._folder / "journal.json").read_text(encoding="utf-8"))
            if all((self._folder / name).stat().st_size >= size for name, size in _sizes(place).items()):
                return place
        return {
            "file_index": 0,
            "row": 0,
            "tokens": 0,
            "documents": 0,
            "skipped": [],
            "counts": Counts()._asdict(),
        }

    def run(self) -> None:
        place = self._place
        _refuse_skips(place["skipped"], self._folder, self._options)
        reader = DocumentReader(
            self._shards,
            self._options.column,
            DataPosition(file_index=place["file_index"], row=place["row"]),
            self._options.skip_bad_shards,
            Counts(**place["counts"]),
            list(place["skipped"]),
            epochs=1,
            holdout=self._options.part,
            excluded=self._options.excluded,
        )
        pool = None
        if self._options.token_column is not None:
            start = DataPosition()
            batches = token_batches(iter(reader), start, int(self._recipe.tokenizer.eos_token_id))
        else:
            pool = EncoderPool(self._recipe, self._options.num_proc)
            batches = encoded_documents(iter(reader), pool)
        try:
            with contextlib.ExitStack() as stack:
                sizes = _sizes(place)
                files = [stack.enter_context(self._continued(name, size)) for name, size in sizes.items()]
                total, documents = self._write(batches, reader, *files)
                _synchronize(*files)
        finally:
            if pool is not None:
                pool.close()
        if total == 0:
            raise DataError(no_text(self._shards, reader.counts))
        meta = {
            "tokens": total,
            "documents": documents,
            "counts": reader.counts._asdict(),
            "skipped": [*reader.skipped, *(skip for _, skip in self._unencodable)],
            "blocks": self._blocks,
        }
        write_json_durably(self._folder / "meta.json", meta)
        (self._folder / "journal.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _continued(self, name: str, size: int) -> Iterator[IO[bytes]]:
        """The file cut to what the journal vouches for, open at its end."""
        with open(self._folder / name, "ab") as file:
            file.truncate(size)
            file.seek(size)
            yield file

    def _write(
        self, batches: Iterator[EncodedBatch], reader: DocumentReader, *files: IO[bytes]
    ) -> tuple[int, int]:
        """Append every batch; returns (tokens, documents) of the whole cache."""
        tokens, starts, rows = files
        total, documents = self._place["tokens"], self._place["documents"]
        journaled = time.monotonic()
        rows_before = [0]
        for shard in self._shards:
            rows_before.append(rows_before[-1] + shard.rows)
        done = rows_before[self._place["file_index"]] + self._place["row"]
        with tqdm(total=rows_before[-1], initial=done, unit="rows", desc="Tokenizing", disable=None) as bar:
            for ids, beginnings, unencodable, block_starts in batches:
                self._note(unencodable)
                self._blocks = self._blocks or block_starts is not None
                ids.tofile(tokens)
                np.array([total + place for place, _, _ in beginnings], dtype=np.int64).tofile(starts)
                np.array([row_key(*mark[1:3]) for _, _, mark in beginnings], dtype=np.int64).tofile(rows)
                if beginnings:
                    place, _, mark = beginnings[-1]
                    document = Document.from_mark(mark)
                    bar.update(rows_before[document.file_index] + document.row - bar.n)
                    if time.monotonic() - journaled >= JOURNAL_SECONDS:
                        _synchronize(*files)
                        self._journal(document, total + place, documents + len(beginnings) - 1, reader)
                        journaled = time.monotonic()
                total += len(ids)
                documents += len(beginnings)
            bar.update(rows_before[-1] - bar.n)
        return total, documents

    def _note(self, unencodable: Sequence[tuple[Mark, str]]) -> None:
        for mark, reason in unencodable:
            document = Document.from_mark(mark)
            refuse_unencodable(document, reason, self._shards, self._options.skip_bad_shards)
            skip = unencodable_skip(document, reason, self._shards)
            self._unencodable.append((document.counts.documents, skip))

    def _journal(self, document: Document, tokens: int, documents: int, reader: DocumentReader) -> None:
        """Vouch for everything before ``document``."""
        place = {
            "file_index": document.file_index,
            "row": document.row,
            "tokens": tokens,
            "documents": documents,
            "blocks": self._blocks,
        }
        before = document.counts.documents
        skipped = reader.skipped[: document.skips] + [
            skip for count, skip in self._unencodable if count < before
        ]
        state = {"counts": document.counts._asdict(), "skipped": skipped}
        write_json_durably(self._folder / "journal.json", place | state)


def _synchronize(*files: IO[bytes]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
