"""Find, order and check the shards of a corpus; compare its file list with the one a checkpoint knew."""

from __future__ import annotations

import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from argonne.data.find_shards import Found, find_shards, shown
from argonne.data.formats import WHOLE_BYTES, Footer, file_digest, read_footer
from argonne.data.remote import ShardPath
from argonne.data.texts import ShardError
from argonne.data.token_rows import TokenColumn, describe_column
from argonne.errors import DataError

FOOTER_THREADS = 16
INDEX_VERSION = 3
MANIFEST_KEYS = ("names", "rows", "sizes", "digests")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of the corpus, in its place in the natural order."""

    path: ShardPath
    name: str
    """Its path below the fixed part of the pattern that found it."""
    size: int
    mtime_ns: int
    digest: str
    group_rows: tuple[int, ...]
    null_rows: int = 0
    """Rows without a text by the footer's statistics (0 where there are none)."""
    fault: str = ""
    """Why a bad shard is skipped (then it counts as a shard without rows)."""

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """The first row of each row group, then the number of rows."""
        return tuple(itertools.accumulate(self.group_rows, initial=0))

    @property
    def rows(self) -> int:
        """Rows of the shard, whatever they hold."""
        return self.first_rows[-1]

    def group_of(self, row: int) -> int:
        """The row group that holds ``row`` (the number of row groups where it lies past the end)."""
        return bisect_right(self.first_rows, row) - 1 if row < self.rows else len(self.group_rows)


def is_unchanged(shard: Shard) -> bool:
    """Whether the file is still the one that was checked; OSError where it cannot be read."""
    status = shard.path.stat()
    if (status.st_size, status.st_mtime_ns) == (shard.size, shard.mtime_ns) and status.st_mtime_ns:
        return True
    return status.st_size == shard.size and file_digest(shard.path) == shard.digest  # only touched


def open_corpus(
    data_glob: str | Sequence[str],
    column: str,
    *,
    skip_bad_shards: bool = False,
    cache_dir: Path | None = None,
    remote_cache: Path | None = None,
) -> list[Shard]:
    """Find every shard and check it by its footer.

    Footers are read in parallel and remembered in ``cache_dir`` by path, size and mtime. Raises DataError
    that names every bad shard at once; with ``skip_bad_shards`` they stay in the list without rows, with
    their ``fault``.
    """
    found = find_shards(data_glob, remote_cache)
    return check_shards(found, column, skip_bad_shards=skip_bad_shards, cache_dir=cache_dir)


def check_shards(
    found: Sequence[Found], column: str, *, skip_bad_shards: bool = False, cache_dir: Path | None = None
) -> list[Shard]:
    """The shards that were found, in that order, checked as `open_corpus` does."""
    index = _FooterIndex(cache_dir / "shard_index.json" if cache_dir else None, column)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        checked = list(pool.map(index.footer, [file.path for file in found]))
    index.save()
    shards = [
        Shard(
            path=file.path,
            name=file.name,
            size=size,
            mtime_ns=mtime_ns,
            digest=footer.digest,
            group_rows=footer.group_rows,
            null_rows=footer.null_rows,
            fault=fault,
        )
        for file, (size, mtime_ns, footer, fault) in zip(found, checked, strict=True)
    ]
    _refuse_bad_shards(shards, column, skip_bad_shards)
    return shards


def _refuse_bad_shards(shards: Sequence[Shard], column: str, skip_bad_shards: bool) -> None:
    bad = [shard for shard in shards if shard.fault]
    if bad and (len(bad) == len(shards) or not skip_bad_shards):
        reasons = "; ".join(f"{shown(shard.path)}: {shard.fault}" for shard in bad)
        remedy = "repair or remove them, or --skip-bad-shards"
        if all("(columns: " in shard.fault for shard in bad):
            is_tokens = isinstance(column, TokenColumn)
            wanted = "token ids with --token-column" if is_tokens else "text with --text-column"
            remedy = f"name the column of the {wanted}" + ("" if len(bad) == len(shards) else f", {remedy}")
        elif len(bad) == len(shards):
            remedy = "repair them or give another --data-glob"
        raise DataError(f"{len(bad)} of {len(shards)} shards cannot be used: {reasons}: {remedy}")
    if sum(shard.rows for shard in shards) == 0:
        raise DataError(f"the {len(shards)} shards from {shown(shards[0].path)} on hold no row (--data-glob)")


def _index_entries(shards: Any) -> dict[str, Any]:
    """Sound entries by path: [size, mtime, ctime, digest, rows of each row group, null rows]."""
    if not isinstance(shards, dict):
        return {}
    return {
        path: entry
        for path, entry in shards.items()
        if isinstance(entry, list)
        and [type(value) for value in entry] == [int, int, int, str, list, int]
        and all(isinstance(rows, int) for rows in entry[4])
    }


class _FooterIndex:
    """Footers remembered between runs; a missing, foreign or broken index is simply rebuilt."""

    def __init__(self, path: Path | None, column: str) -> None:
        self._path = path
        self._column = column
        self._known: dict[str, Any] = {}
        self._entries: dict[str, Any] = {}
        if path is not None and path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = None
            if (
                isinstance(content, dict)
                and content.get("version") == INDEX_VERSION
                and content.get("column") == describe_column(column)
            ):
                self._known = _index_entries(content.get("shards"))

    def footer(self, path: ShardPath) -> tuple[int, int, Footer, str]:
        """(size, mtime_ns, footer, fault) of one shard."""
        try:
            status = path.stat()
        except OSError as error:
            return 0, 0, Footer(group_rows=(), digest=""), str(error.strerror)
        try:
            str(path).encode()
        except UnicodeEncodeError:
            fault = "its path is not UTF-8: rename it"
            return status.st_size, status.st_mtime_ns, Footer(group_rows=(), digest=""), fault
        key = str(path.absolute())
        known = self._known.get(key)
        # ctime: what edits a file and puts its mtime back cannot put that back.
        state = [status.st_size, status.st_mtime_ns, getattr(status, "st_ctime_ns", 0)]
        if known is not None and known[:3] == state and status.st_mtime_ns:
            self._entries[key] = known
            footer = Footer(digest=known[3], group_rows=tuple(known[4]), null_rows=known[5])
            return status.st_size, status.st_mtime_ns, footer, ""
        try:
            footer = read_footer(path, self._column)
        except ShardError as error:
            return status.st_size, status.st_mtime_ns, Footer(group_rows=(), digest=""), str(error)
        self._entries[key] = [*state, footer.digest, list(footer.group_rows), footer.null_rows]
        return status.st_size, status.st_mtime_ns, footer, ""

    def save(self) -> None:
        """Write the index where it has changed; a folder that cannot be written is no trouble."""
        if self._path is None or self._entries == self._known:
            return
        content = {
            "version": INDEX_VERSION,
            "column": describe_column(self._column),
            "shards": {**self._known, **self._entries},
        }
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content), encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:  # only a cache: the next start reads the footers again
            temporary.unlink(missing_ok=True)


def manifest(shards: Sequence[Shard]) -> dict[str, list[Any]]:
    """The file list as a checkpoint keeps it: columns of names, rows, sizes (bytes), hashes and mtimes."""
    return {
        "names": [shard.name for shard in shards],
        "rows": [shard.rows for shard in shards],
        "sizes": [shard.size for shard in shards],
        "digests": [shard.digest for shard in shards],
        "mtimes": [shard.mtime_ns for shard in shards],
    }


def current_names(saved: Mapping[str, Sequence[Any]], shards: Sequence[Shard]) -> dict[str, str]:
    """Saved name -> today's, where another pattern or an older version named a shard otherwise.

    Either name then ends with the other; of several such shards the one of the same content is meant.
    """
    today = {shard.name: shard for shard in shards}
    free = [shard for shard in shards if shard.name not in set(saved["names"])]
    found = {}
    for name, rows, size, digest in zip(*(saved[key] for key in MANIFEST_KEYS), strict=True):
        if name in today:
            found[name] = name
            continue
        alike = [shard for shard in free if _is_end_of_other(shard.name, name)]
        same = [shard for shard in alike if _is_same(shard, rows, size, digest)]
        if same or alike:
            found[name] = (same or alike)[0].name
            free.remove((same or alike)[0])
    return found


def _is_end_of_other(name: str, other: str) -> bool:
    return f"/{name}".endswith(f"/{other}") or f"/{other}".endswith(f"/{name}")


def renamed(saved: Mapping[str, Sequence[Any]], shards: Sequence[Shard]) -> dict[str, Sequence[Any]]:
    """The saved file list with today's names."""
    names = current_names(saved, shards)
    return {**saved, "names": [names.get(name, name) for name in saved["names"]]}


def _is_same(shard: Shard, rows: int, size: int, digest: str) -> bool:
    """Whether a shard is the saved one (an older version's digest is the beginning of today's)."""
    return (shard.rows, shard.size) == (rows, size) and bool(digest) and shard.digest.startswith(digest)


def touched(saved: Mapping[str, Sequence[Any]], shards: Sequence[Shard]) -> list[str]:
    """Shards with another mtime than the saved one whose content is compared in samples only."""
    times = dict(zip(saved["names"], saved.get("mtimes", ()), strict=False))
    return [
        shard.name
        for shard in shards
        if shard.size > WHOLE_BYTES and times.get(shard.name, shard.mtime_ns) != shard.mtime_ns
    ]


def manifest_difference(saved: Mapping[str, Sequence[Any]], shards: Sequence[Shard]) -> str:
    """What makes today's shards another stream than the saved file list, "" if nothing.

    Shards appended after the last saved one make no difference, nor does a saved shard that is now bad and
    skipped (the skip is recorded).
    """
    now = {shard.name: shard for shard in shards}
    saved_names = list(saved["names"])
    changes = []
    removed = [name for name in saved_names if name not in now]
    known = set(saved_names)
    added = [shard.name for shard in shards[: len(saved_names)] if shard.name not in known]
    if removed:
        changes.append("removed: " + ", ".join(removed))
    if added:
        changes.append("added before the end: " + ", ".join(added))
    rewritten = []
    for name, rows, size, digest in zip(
        saved_names, saved["rows"], saved["sizes"], saved["digests"], strict=True
    ):
        shard = now.get(name)
        if shard is not None and not shard.fault and not _is_same(shard, rows, size, digest):
            rewritten.append(f"{name} ({rows} rows, {size} bytes -> {shard.rows} rows, {shard.size} bytes)")
    if rewritten:
        changes.append("rewritten: " + ", ".join(rewritten))
    if not changes and [shard.name for shard in shards[: len(saved_names)]] != saved_names:
        changes.append("in another order")
    return "; ".join(changes)
