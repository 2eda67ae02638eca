"""``--exclude-documents``: a list of documents, and the rows of today's shards that it names.

One document a line, as JSON with ``file`` and ``row``, or as ``000_00042.parquet:17``. ``file`` is the name
of the shard, its last part or its full path; ``row`` counts from 0. ``source`` (of a mixture; left out: every
source that has the file) and ``hash`` (`text_hash`; left out: the text is not compared) may be given. Empty
lines and lines that begin with ``#`` say nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from argonne.data.find_shards import shown
from argonne.data.flat_tokens import is_flat
from argonne.data.formats import open_shard
from argonne.data.holdout import document_digest
from argonne.data.shards import Shard
from argonne.data.texts import LongText, ShardError
from argonne.data.token_rows import TokenRow
from argonne.errors import DataError, one_line

FLAG = "--exclude-documents"
HASH_BYTES = 16
Text = str | LongText | TokenRow
RowsOfSources = Mapping[str, Mapping[str, Sequence[int]]]
"""Source ("" of the only one) -> shard's name -> rows, ascending: what a checkpoint keeps of a list."""


class Entry(NamedTuple):
    """One line of a list."""

    where: str
    """Flag, file and line, for messages."""
    source: str | None
    """None: every source that has the file."""
    file: str
    row: int
    text_hash: str = ""
    """"": the text is not compared."""


class Found(NamedTuple):
    """An entry at its place in today's shards."""

    entry: Entry
    source: str
    number: int
    """Of the shard."""


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """The documents that a run leaves out."""

    rows: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """As `RowsOfSources`."""

    @classmethod
    def of(cls, rows: RowsOfSources) -> Exclusion:
        """From what a checkpoint keeps."""
        kept = {
            source: {name: sorted(map(int, numbers)) for name, numbers in sorted(shards.items()) if numbers}
            for source, shards in sorted(rows.items())
        }
        return cls(rows={source: shards for source, shards in kept.items() if shards})

    @classmethod
    def read(cls, path: Path) -> Exclusion:
        """From a file that `list_text` filled."""
        rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for entry in read_list(path):
            rows[entry.source or ""][entry.file].append(entry.row)
        return cls.of(rows)

    def __len__(self) -> int:
        return sum(len(rows) for shards in self.rows.values() for rows in shards.values())

    @property
    def digest(self) -> str:
        """Names the list in metrics and files; "" of an empty one."""
        content = json.dumps(self.rows, sort_keys=True).encode()
        return hashlib.blake2b(content, digest_size=HASH_BYTES).hexdigest() if self.rows else ""

    def by_number(self, source: str, shards: Sequence[Shard]) -> dict[int, frozenset[int]]:
        """The rows of each shard of a source that has any, by the shard's number."""
        named = self.rows.get(source, {})
        return {n: frozenset(named[shard.name]) for n, shard in enumerate(shards) if shard.name in named}

    def documents(self) -> Iterator[tuple[str, str, int]]:
        """(source, shard's name, row) of each."""
        for source, shards in self.rows.items():
            for name, rows in shards.items():
                yield from ((source, name, row) for row in rows)


def text_hash(text: Text) -> str:
    """blake2b (16 bytes, hex) of the UTF-8 text, or of a row's ids as little-endian int32."""
    return document_digest(text, HASH_BYTES).hex()


def list_line(source: str, file: str, row: int, text: Text | None = None) -> str:
    """One line of a list, without its end."""
    content: dict[str, Any] = {"source": source} if source else {}
    content |= {"file": file, "row": row}
    return json.dumps(content if text is None else {**content, "hash": text_hash(text)}, ensure_ascii=False)


def list_text(exclusion: Exclusion) -> str:
    """A list of the same documents, without the hashes of their texts."""
    return "".join(f"{list_line(*document)}\n" for document in exclusion.documents())


def read_list(path: str | Path) -> list[Entry]:
    """The entries of a list; DataError naming file and line where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(
            f"{FLAG} {path}: {reason}: give a list as scripts/find_document.py writes it"
        ) from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            found.append(_entry(stripped, f"{FLAG} {path}, line {number}"))
    return found


def _entry(line: str, where: str) -> Entry:
    form = 'give {"file": SHARD, "row": N}, with "source" and "hash" where they are known, or SHARD:N'
    if not line.startswith("{"):
        file, _, row = line.rpartition(":")
        if not file or not row.isdecimal():
            raise DataError(f"{where}: {line[:80]!r} names no document: {form}")
        return Entry(where, None, file, int(row))
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}: {form}") from error
    kinds = {"source": str, "file": str, "row": int, "hash": str}
    wrong = [key for key, value in content.items() if type(value) is not kinds.get(key)]
    if wrong or "file" not in content or content.get("row", -1) < 0:
        what = f"{wrong[0]!r} is not understood" if wrong else "it names no file and row"
        raise DataError(f"{where}: {what}: {form}")
    return Entry(where, content.get("source"), content["file"], content["row"], content.get("hash", ""))


def find_entries(
    entries: Sequence[Entry], corpora: Mapping[str, Sequence[Shard]], *, others: bool = False
) -> tuple[Exclusion, list[Found]]:
    """The rows that a list names among the shards of each source.

    DataError for an entry that names no document of them; with ``others``, which the run has elsewhere,
    such an entry is passed over where it is the file or the source that is not here.
    """
    known = {source: _by_name(shards) for source, shards in corpora.items()}
    rows: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    placed = []
    for entry in entries:
        sources = [entry.source] if entry.source is not None else list(corpora)
        here = [(source, index) for source in sources for index in known.get(source, {}).get(entry.file, ())]
        if not here and not others:
            raise DataError(f"{entry.where}: {_unknown(entry, corpora)}")
        for source, index in here:
            shard = corpora[source][index]
            _require_one(entry, [n for name, n in here if name == source], corpora[source])
            if entry.row >= shard.rows and not shard.fault:
                if all(entry.row >= corpora[name][number].rows for name, number in here):
                    raise DataError(
                        f"{entry.where}: {shard.name!r} has {shard.rows} rows (from 0), and no row "
                        f"{entry.row}: correct it"
                    )
                continue  # another source's shard of this name is meant
            rows[source][shard.name].add(entry.row)
            placed.append(Found(entry, source, index))
    named = {
        source: {name: sorted(found) for name, found in shards.items()} for source, shards in rows.items()
    }
    return Exclusion.of(named), placed


def require_entries(path: str | Path, several: Sequence[Mapping[str, Sequence[Shard]]]) -> None:
    """DataError for an entry that names no document of any of several corpora."""
    entries = read_list(path)
    here = {one.entry for corpora in several for one in find_entries(entries, corpora, others=True)[1]}
    for entry in entries:
        if entry not in here:
            find_entries([entry], several[0])


def _by_name(shards: Sequence[Shard]) -> dict[str, list[int]]:
    """Numbers of the shards that a text may mean: by name, by last part of the name, by full path."""
    found: dict[str, list[int]] = defaultdict(list)
    names = {shard.name for shard in shards}
    for number, shard in enumerate(shards):
        others = {shard.name.rpartition("/")[2], str(shard.path), str(shard.path.absolute())} - names
        for name in {shard.name, *others}:
            found[name].append(number)
    return found


def _unknown(entry: Entry, corpora: Mapping[str, Sequence[Shard]]) -> str:
    if entry.source is not None and entry.source not in corpora:
        names = ", ".join(name for name in corpora if name) or "none by name (--data-glob)"
        return f"there is no source {entry.source!r} among the data's, which are {names}: name one of these"
    of = f" of source {entry.source!r}" if entry.source else ""
    first = next((shards[0].name for name, shards in corpora.items() if entry.source in (None, name)), "none")
    return (
        f"{entry.file!r} is no shard{of} of the data, whose first is {first!r}: name the shard as it is found"
    )


def _require_one(entry: Entry, alike: list[int], shards: Sequence[Shard]) -> None:
    """DataError unless one shard of a source is meant, and it has documents."""
    name = shards[alike[0]].name
    if len(alike) > 1:
        names = " and ".join(repr(shards[number].name) for number in alike[:2])
        raise DataError(f"{entry.where}: {entry.file!r} may be {names}: give the whole name")
    if is_flat(name):
        raise DataError(
            f"{entry.where}: {name!r} is a flat token file, which has no rows to leave out: "
            "make a list column of it (scripts/prepare_data.py --tokenize), or take the line out"
        )


def checked_digest(placed: Sequence[Found]) -> str:
    """Hash of the entries and their places; "" without any hash of a text among them."""
    entries = sorted({(one.source, one.number, one.entry.row, one.entry.text_hash) for one in placed})
    if not any(text_hash for *_, text_hash in entries):
        return ""
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=HASH_BYTES).hexdigest()


def check_hashes(
    placed: Sequence[Found], corpora: Mapping[str, Sequence[Shard]], columns: Mapping[str, str]
) -> None:
    """DataError where an entry has a hash and its row another text. Reads the row groups of those entries."""
    wanted: dict[tuple[str, int], dict[int, Entry]] = defaultdict(dict)
    for entry, source, index in placed:
        if entry.text_hash and not corpora[source][index].fault:
            wanted[source, index][entry.row] = entry
    for (source, index), entries in wanted.items():
        shard = corpora[source][index]
        texts = read_rows(shard, columns[source], entries)
        for row, entry in entries.items():
            text = texts.get(row)
            is_hash = "no text" if not text and not isinstance(text, LongText) else text_hash(text)
            if is_hash != entry.text_hash.lower():
                raise DataError(
                    f"{entry.where}: the text of {shard.name!r} row {row} has the hash {is_hash}, and the "
                    f"list says {entry.text_hash}: make it anew (scripts/find_document.py --exclude-list)"
                )


def read_rows(shard: Shard, column: str, rows: Sequence[int] | Mapping[int, Any]) -> dict[int, Text | None]:
    """The texts, or ids, of some rows; each row group that has any is read once, up to the last of them.

    Raises DataError where the shard cannot be read.
    """
    groups: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        if row < shard.rows:
            groups[shard.group_of(row)].add(row)
    found: dict[int, Text | None] = {}
    try:
        with open_shard(shard.path, column) as reader:
            for group, wanted in sorted(groups.items()):
                first = shard.first_rows[group]
                for batch in reader.batches(group):
                    for row in [row for row in wanted if first <= row < first + len(batch.texts)]:
                        text = batch.texts[row - first]
                        found[row] = text.copy() if isinstance(text, TokenRow) else text
                    first += len(batch.texts)
                    if first > max(wanted):
                        break
    except (ShardError, pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {shown(shard.path)}: {one_line(error)}: repair it") from error
    return found
