"""The excluded documents of a run's sources; at a resume, what changed and what was trained on already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from argonne.data.cached_source import CachedSamples, cached_options, epoch_order
from argonne.data.excluded import (
    FLAG,
    Exclusion,
    Text,
    check_hashes,
    checked_digest,
    find_entries,
    read_list,
    read_rows,
)
from argonne.data.order import RowPlaces
from argonne.data.shards import Shard, current_names
from argonne.data.source import DataProgress, SourceOptions
from argonne.data.texts import LongText
from argonne.data.token_cache import find_cache
from argonne.data.token_rows import TokenRow
from argonne.data.tokenizer import UnencodableError, encode_all, plain_ids, text_pieces, tokenizer_fingerprint
from argonne.errors import DataError

EXCLUDED, CACHED_WITHOUT, CHECKED = "excluded", "cached_without", "excluded_checked"
"""Of a checkpoint's ``data_state``: the rows of the list, those that the token cache was made without, and a
hash of the list with the hashes of its texts, which were compared."""
NAMED = 3
COUNTED = 1000
"""Documents that were trained on already which a warning names, and counts: asking costs a row each with
--no-packing."""
Parts = dict[str, SourceOptions]
Corpora = Mapping[str, list[Shard]]


def exclude(
    options: SourceOptions, own: Parts, corpora: Corpora, state: Mapping[str, Any] | None = None
) -> tuple[Exclusion, Parts, dict[str, Any]]:
    """The list of --exclude-documents, each source's options with its rows, what a checkpoint keeps of it.

    ``state``: a checkpoint's, whose list was compared with the texts. DataError for a list that cannot be
    read, that names what is not there, or whose hash is not that of the text.
    """
    given, checked = options.exclude, ""
    if given is None:
        exclusion = Exclusion()
    elif isinstance(given, Exclusion):
        exclusion = given
    else:
        entries = read_list(given)
        if options.source_name:
            mine = [one for one in entries if one.source in (None, options.source_name)]
            entries = [one._replace(source=None) for one in mine]
        exclusion, placed = find_entries(entries, corpora, others=options.exclude_elsewhere)
        checked = checked_digest(placed)
        if checked != (state or {}).get(CHECKED, ""):
            check_hashes(placed, corpora, {name: part.column for name, part in own.items()})
    own = {
        name: replace(part, excluded=exclusion.by_number(name, corpora[name])) for name, part in own.items()
    }
    return exclusion, own, {EXCLUDED: exclusion.rows, CHECKED: checked}


def exclude_at_resume(
    options: SourceOptions, own: Parts, corpora: Corpora, state: Mapping[str, Any] | None
) -> tuple[Exclusion, Parts, dict[str, Any], list[str]]:
    """As `exclude`, with the rows that each token cache is made without, and with notices."""
    exclusion, own, kept = exclude(options, own, corpora, state)
    notices = change_notice(state, exclusion)
    if options.streaming:
        return exclusion, own, kept, notices
    made = {}
    for name, part in own.items():
        basis, lost = cache_basis(state, name, corpora[name], part.excluded)
        if lost and not options.allow_data_change:
            raise DataError(
                f"{FLAG} no longer names {lost} documents that the token cache of the run was made without, "
                "and with them the order of --no-streaming would be another: name them again, or "
                "--allow-data-change to go on in the other order"
            )
        own[name] = replace(part, cached_without=basis)
        made[name] = {corpora[name][index].name: sorted(rows) for index, rows in basis.items()}
    return exclusion, own, {**kept, CACHED_WITHOUT: Exclusion.of(made).rows}, notices


def saved_rows(
    state: Mapping[str, Any] | None, key: str, source: str, shards: Sequence[Shard]
) -> dict[int, frozenset[int]]:
    """The rows of one of today's sources that a checkpoint has under ``key``, by the shard's number."""
    kept = (state or {}).get(key) or {}
    # One source may have become a mixture, or a mixture one source.
    shards_of = kept.get(source) or ({} if source in kept or len(kept) != 1 else next(iter(kept.values())))
    if not shards_of or state is None:
        return {}
    known = state.get("sources", {}).get(source, {}).get("manifest") or state.get("manifest")
    names = current_names(known, shards) if known else {}
    today = {names.get(name, name): frozenset(rows) for name, rows in shards_of.items()}
    return {number: today[shard.name] for number, shard in enumerate(shards) if shard.name in today}


def change_notice(state: Mapping[str, Any] | None, exclusion: Exclusion) -> list[str]:
    """A line where the list is not the checkpoint's."""
    if state is None:
        return []
    before = Exclusion.of(state.get(EXCLUDED) or {})
    if before.rows == exclusion.rows:
        return []
    others = set(exclusion.documents()) - set(before.documents())
    new = f", {len(others)} of them new" if others and len(before) else ""
    return [f"excluded documents: {len(before)} -> {len(exclusion)}{new} ({FLAG})"]


def cache_basis(
    state: Mapping[str, Any] | None,
    source: str,
    shards: Sequence[Shard],
    excluded: Mapping[int, frozenset[int]],
) -> tuple[dict[int, frozenset[int]], int]:
    """(rows that the token cache is made without, how many of the checkpoint's are no longer excluded)."""
    if state is None:
        return dict(excluded), 0
    made = saved_rows(state, CACHED_WITHOUT, source, shards)
    kept = {index: rows & excluded.get(index, frozenset()) for index, rows in made.items()}
    lost = sum(map(len, made.values())) - sum(map(len, kept.values()))
    return {index: rows for index, rows in kept.items() if rows}, lost


class ReadRows:
    """Which rows of one source its training up to a place has seen, be it a token of theirs as a target.

    Only with ``--no-packing``, which drops short documents, is the row that is asked about read.
    """

    def __init__(
        self, options: SourceOptions, shards: Sequence[Shard], progress: DataProgress, tokenizer: Any
    ) -> None:
        self._options, self._shards, self._tokenizer = options, shards, tokenizer
        self._position, self._samples = progress.position, progress.samples
        self._places = RowPlaces(shards, options.order)
        self._cached: tuple[CachedSamples, set[int]] | None = None

    def __contains__(self, row: tuple[int, int]) -> bool:
        """Of the shard's number and its row."""
        return self._in_cache(*row) if self._position.sample is not None else self._in_stream(*row)

    def _in_stream(self, index: int, row: int) -> bool:
        position, packing = self._position, self._options.packing
        if position.epoch == 0:
            place = self._places.place(0, index, row)
            here = self._places.place(0, position.file_index, position.row)
            if place > here:
                return False
            if place == here:  # packed, the last target of all was the token at the position
                return position.token_offset > 0 or (packing and self._samples > 0)
        return packing or document_tokens(self._options, self._shards[index], row, self._tokenizer) > (
            self._options.block_size
        )

    def _in_cache(self, index: int, row: int) -> bool:
        position = self._position
        if position.epoch == 0 and not position.sample:
            return False
        if self._cached is None:
            made = cached_options(self._options)
            cache = find_cache(self._shards, tokenizer_fingerprint(self._tokenizer), made)
            samples = CachedSamples(cache, self._shards, made)
            taken = epoch_order(made.seed, position.epoch, len(samples.starts))[: position.sample]
            self._cached = samples, set(taken.tolist())
        samples, taken_now = self._cached
        numbers = samples.of_row(index, row).tolist()
        return bool(numbers) if position.epoch else not taken_now.isdisjoint(numbers)


def document_tokens(options: SourceOptions, shard: Shard, row: int, tokenizer: Any) -> int:
    """Tokens of a row in the stream, EOS included; 0 of a row without text. Tokenizes this row alone."""
    text: Text | None = read_rows(shard, options.column, [row]).get(row)
    if isinstance(text, TokenRow):
        return len(text)
    if text is None or not (text or isinstance(text, LongText)):
        return 0
    pieces = list(text_pieces(text))
    try:
        ids, _ = encode_all(
            lambda texts: (plain_ids(tokenizer, one) for one in texts),
            [piece for piece, _ in pieces],
            [last for _, last in pieces],
            int(tokenizer.eos_token_id),
        )
    except UnencodableError as error:
        ids = error.ids
    return len(ids)


def new_and_read(
    own: Mapping[str, SourceOptions],
    corpora: Mapping[str, list[Shard]],
    progress: Mapping[str, DataProgress],
    state: Mapping[str, Any] | None,
    tokenizer: Any,
) -> Iterator[str]:
    """The excluded documents that the checkpoint's list has not and that its training has seen, in words."""
    for source, options in own.items():
        shards = corpora[source]
        before = saved_rows(state, EXCLUDED, source, shards)
        seen = ReadRows(options, shards, progress[source], tokenizer)
        for index, rows in sorted(options.excluded.items()):
            for row in sorted(rows - before.get(index, frozenset())):
                if (index, row) in seen:
                    named = f"source {source!r}: " if source else ""
                    yield f"{named}{shards[index].name} row {row}"


def refuse_read(documents: Iterator[str], allow_data_change: bool) -> list[str]:
    """The notice of excluded documents that were trained on already; DataError unless that was allowed."""
    named = list(islice(documents, NAMED))
    if not named:
        return []
    if not allow_data_change:
        raise ReadBeforeError(
            f"{FLAG} names {named[0]}, which the run has trained on",
            "branch off from a checkpoint that had not seen it (scripts/branch_run.py), or "
            "--allow-data-change to leave it out from here on",
        )
    if len(named) == 1:
        return [f"{FLAG} names {named[0]}, which the run has trained on: it is left out from here on"]
    count = len(named) + sum(1 for _ in islice(documents, COUNTED - len(named) + 1))
    number = f"more than {COUNTED:,}" if count > COUNTED else f"{count:,}"
    others = ", ..." if count > len(named) else ""
    return [
        f"{FLAG} names {number} documents that the run has trained on ({', '.join(named)}{others}): they are "
        "left out from here on"
    ]


class ReadBeforeError(DataError):
    """An excluded document was trained on: what is wrong, and the remedy where nothing better is known."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}: {remedy}")
        self.fault = fault

    def __reduce__(self) -> tuple[type[DataError], tuple[str]]:
        return DataError, (str(self),)
