"""The token stream: open rank 0's source, or mixture of sources, from options and a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from argonne.data.cached_source import CachedSource
from argonne.data.encoder_pool import EncoderPool
from argonne.data.excluded import Exclusion, list_text, require_entries
from argonne.data.exclusion_resume import (
    ReadBeforeError,
    exclude,
    exclude_at_resume,
    new_and_read,
    refuse_read,
)
from argonne.data.feed import StepBatch, StepFeed
from argonne.data.find_shards import find_shards, shown
from argonne.data.held_out import HeldOutSet, check_data, read_held_out
from argonne.data.mixture import MixtureSource, naming, shares
from argonne.data.mixture_resume import (
    MixturePlan,
    mixture_start,
    one_of_mixture,
    plan_mixture,
    source_state,
)
from argonne.data.position import DataPosition
from argonne.data.resume import check_identity, resume, source_identity
from argonne.data.shards import Shard, manifest
from argonne.data.source import (
    DataProgress,
    MixPart,
    SampleSource,
    SingleSource,
    SourceOptions,
    StreamingSource,
    TokenSource,
)
from argonne.data.stream import BATCHES_PER_WORKER
from argonne.data.target_file import TargetsFolder, TargetsForm, TargetsHeader, TargetsReader
from argonne.data.token_stream import open_shards, source_by_columns, with_vocabulary
from argonne.data.tokenizer import EncoderRecipe, load_tokenizer, tokenizer_fingerprint

__all__ = [
    "DataPosition",
    "DataProgress",
    "Exclusion",
    "HeldOutSet",
    "MixPart",
    "OpenedStream",
    "ReadBeforeError",
    "SourceOptions",
    "StepBatch",
    "StepFeed",
    "TargetsFolder",
    "TargetsForm",
    "TargetsHeader",
    "TargetsReader",
    "check_data",
    "find_shards",
    "held_out_options",
    "list_text",
    "load_tokenizer",
    "open_sources",
    "open_stream",
    "read_before",
    "read_held_out",
    "require_listed",
    "tokenizer_fingerprint",
]


@dataclass(frozen=True, kw_only=True)
class OpenedStream:
    """A source with what the entry prints and keeps of it."""

    source: TokenSource
    corpora: Mapping[str, list[Shard]]
    """The shards of each source of a mixture by its name; without one, of the only source: ""."""
    identity: dict[str, Any]
    notices: tuple[str, ...]
    """Warnings for the console, each once."""
    start: DataProgress
    """Where the stream stands before the first step of this run."""
    exclusion: Exclusion = field(default_factory=Exclusion)
    """The documents that are left out."""

    @property
    def shards(self) -> list[Shard]:
        """Those of all sources."""
        return [shard for shards in self.corpora.values() for shard in shards]

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of a mixture, in the order in which they were named."""
        return tuple(name for name in self.corpora if name)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return {source: [shard.name for shard in shards] for source, shards in self.corpora.items()}

    def position_dict(self, progress: DataProgress) -> dict[str, Any]:
        """A checkpoint's ``data_position``."""
        return progress.position_dict(self._names)

    def state_dict(self, progress: DataProgress) -> dict[str, Any]:
        """A checkpoint's ``data_state``: plain containers."""
        manifests = {source: manifest(shards) for source, shards in self.corpora.items()}
        return {**self.identity, **progress.state_dict(manifests)}


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The sources of a run, checked, and the place of each."""

    own: dict[str, SourceOptions]
    """Of each source, by what its shards hold, with its excluded rows."""
    corpora: dict[str, list[Shard]]
    identity: dict[str, Any]
    exclusion: Exclusion
    begun: dict[str, DataProgress]
    notices: list[str]
    state: Mapping[str, Any] | None
    """The checkpoint's, as far as it is of this data."""
    plan: MixturePlan | None = None
    """Of a mixture."""


def open_stream(
    options: SourceOptions,
    tokenizer: Any,
    *,
    saved_position: Mapping[str, Any] | None = None,
    saved_state: Mapping[str, Any] | None = None,
    global_step: int = 0,
) -> OpenedStream:
    """Check the corpus and build rank 0's source, from the start or from a checkpoint's place.

    ``saved_position`` is a checkpoint's ``data_position`` (ours or a pipeline script's), ``saved_state`` its
    ``data_state`` (None in a pipeline checkpoint). Raises DataError before anything is tokenized, a
    ReadBeforeError where a document that is to be left out was trained on.
    """
    options = with_vocabulary(options, tokenizer)
    find = _find_mixture if options.mix else _find_single
    found = find(options, tokenizer, saved_position, saved_state, global_step)
    notices = list(found.notices)
    if found.exclusion.rows and saved_position is not None:
        notices += refuse_read(_read_before(found, tokenizer), options.allow_data_change)
    recipe = EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code)
    pool = _pool(recipe, found.own.values())
    weights = {part.name: part.weight for part in options.mix}
    share = shares(weights) if weights else {"": Fraction(1)}
    sources = {
        name: _build_source(
            found.corpora[name], recipe, pool, found.identity, own, found.begun[name], share[name]
        )
        for name, own in found.own.items()
    }
    source: TokenSource
    if found.plan is None:
        start = found.begun[""]
        source = SingleSource(sources[""], options.samples_per_step)
    else:
        start = mixture_start(weights, found.begun, found.plan, saved_state)
        source = MixtureSource(sources, start, options.samples_per_step, options.block_size)
    return OpenedStream(
        source=source,
        corpora=found.corpora,
        identity=found.identity,
        notices=tuple(notices),
        start=start,
        exclusion=found.exclusion,
    )


def read_before(
    options: SourceOptions,
    tokenizer: Any,
    *,
    saved_position: Mapping[str, Any],
    saved_state: Mapping[str, Any] | None,
    global_step: int,
) -> str | None:
    """The first excluded document that a checkpoint's training has seen and its list has not, or None."""
    options = with_vocabulary(options, tokenizer)
    find = _find_mixture if options.mix else _find_single
    found = find(options, tokenizer, saved_position, saved_state, global_step)
    return next(_read_before(found, tokenizer), None)


def _read_before(found: _Found, tokenizer: Any) -> Iterator[str]:
    return new_and_read(found.own, found.corpora, found.begun, found.state, tokenizer)


def open_sources(options: SourceOptions) -> dict[str, tuple[SourceOptions, list[Shard]]]:
    """Options, with the excluded rows, and shards of each source by its name, "" of the only one."""
    if options.mix:
        found = {part.name: open_shards(source_by_columns(options, part.glob)) for part in options.mix}
    else:
        found = {"": open_shards(options)}
    corpora = {name: shards for name, (_, shards) in found.items()}
    _, own, _ = exclude(options, {name: part for name, (part, _) in found.items()}, corpora)
    return {name: (own[name], shards) for name, shards in corpora.items()}


def require_listed(stages: Iterable[SourceOptions]) -> None:
    """DataError for a document that a list of --exclude-documents names and no stage's data has."""
    corpora: dict[str, list[Mapping[str, list[Shard]]]] = {}
    for options in stages:
        if isinstance(options.exclude, str | Path):
            opened = open_sources(replace(options, exclude=None))
            found = {name: shards for name, (_, shards) in opened.items()}
            corpora.setdefault(str(options.exclude), []).append(found)
    for path, several in corpora.items():
        require_entries(path, several)


def held_out_options(options: SourceOptions) -> dict[str, SourceOptions]:
    """How to open what ``--holdout`` keeps out of training, by the source's name ("" of the only one).

    The held-out documents as a packed stream in their natural order; ``open_stream`` without a saved place
    begins at its first document.
    """
    part = replace(
        options,
        held_out=True,
        shuffle=False,
        streaming=True,
        packing=True,
        mix=(),
        exclude_elsewhere=bool(options.mix) or options.exclude_elsewhere,
    )
    if not options.mix:
        return {"": part}
    return {
        source.name: replace(source_by_columns(part, source.glob), source_name=source.name)
        for source in options.mix
    }


def _check_corpus(options: SourceOptions) -> tuple[SourceOptions, list[Shard], list[str]]:
    """The options of the source by what its shards hold, the shards, checked by their footers, and what the
    console should say of them."""
    options, shards = open_shards(options)
    bad = [shard for shard in shards if shard.fault]
    notices = [f"skipping the bad shard {shown(shard.path)}: {shard.fault}" for shard in bad]
    empty = [shard.name for shard in shards if 0 < shard.rows == shard.null_rows]
    if empty:
        notices.append(f"without any text in {str(options.column)!r} (--text-column): {', '.join(empty)}")
    return options, shards, notices


def _pool(recipe: EncoderRecipe, sources: Iterable[SourceOptions]) -> EncoderPool | None:
    """The tokenizing workers, where one of the sources streams text."""
    texts = [options for options in sources if options.streaming and options.token_column is None]
    return EncoderPool(recipe, texts[0].num_proc) if texts else None


def _build_source(
    shards: list[Shard],
    recipe: EncoderRecipe,
    pool: EncoderPool | None,
    identity: Mapping[str, Any],
    options: SourceOptions,
    progress: DataProgress,
    share: Fraction = Fraction(1),
) -> SampleSource:
    """One source at its place; ``share``: of the pool's work that is its own."""
    if not options.streaming:
        return CachedSource(shards, recipe, identity["tokenizer"], options, progress)
    if pool is None or options.token_column is not None:
        return StreamingSource(shards, None, options, progress, eos=int(recipe.tokenizer.eos_token_id))
    ahead = math.ceil(BATCHES_PER_WORKER * pool.workers * share)
    return StreamingSource(shards, pool, options, progress, ahead if share == 1 else 1 + ahead)


def _find_single(
    options: SourceOptions,
    tokenizer: Any,
    saved_position: Mapping[str, Any] | None,
    saved_state: Mapping[str, Any] | None,
    global_step: int,
) -> _Found:
    own, shards, notices = _check_corpus(options)
    if saved_position is not None and "mixture" in saved_position:
        saved_position, saved_state, remarks = one_of_mixture(
            saved_position, saved_state, shards, options.allow_data_change
        )
        notices += remarks
    identity = source_identity(own, tokenizer)
    if saved_state is not None:
        notices += check_identity(saved_state, identity, options.allow_data_change)
    exclusion, parts, kept, remarks = exclude_at_resume(own, {"": own}, {"": shards}, saved_state)
    notices += remarks
    progress, remarks = resume(parts[""], shards, saved_position, saved_state, global_step)
    return _Found(
        own=parts,
        corpora={"": shards},
        identity=identity | kept,
        exclusion=exclusion,
        begun={"": progress},
        notices=notices + remarks,
        state=saved_state,
    )


def _find_mixture(
    options: SourceOptions,
    tokenizer: Any,
    saved_position: Mapping[str, Any] | None,
    saved_state: Mapping[str, Any] | None,
    global_step: int,
) -> _Found:
    own: dict[str, SourceOptions] = {}
    corpora: dict[str, list[Shard]] = {}
    notices: list[str] = []
    for name, _, data_glob in options.mix:
        with naming(name):
            own[name], corpora[name], remarks = _check_corpus(source_by_columns(options, data_glob))
        notices += [f"source {name!r}: {remark}" for remark in remarks]
    identity = source_identity(options, tokenizer)
    if saved_state is not None:
        notices += check_identity(saved_state, identity, options.allow_data_change)
    exclusion, own, kept, remarks = exclude_at_resume(options, own, corpora, saved_state)
    notices += remarks
    plan = plan_mixture(options.mix, corpora, saved_position, saved_state, options.allow_data_change)
    notices += plan.notices
    begun: dict[str, DataProgress] = {}
    for name, its_options in own.items():
        position, state = source_state(name, plan, saved_state)
        with naming(name):
            begun[name], remarks = resume(its_options, corpora[name], position, state, global_step)
        notices += [f"source {name!r}: {remark}" for remark in remarks]
    return _Found(
        own=own,
        corpora=corpora,
        identity=identity | kept,
        exclusion=exclusion,
        begun=begun,
        notices=notices,
        state=saved_state,
        plan=plan,
    )
