"""The token stream: open rank 0's source, or mixture of sources, from options and a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from argonne.data.encoder_pool import EncoderPool
from argonne.data.feed import StepBatch, StepFeed
from argonne.data.find_shards import find_shards, shown
from argonne.data.held_out import HeldOutSet, check_data, read_held_out
from argonne.data.mixture import MixtureSource, naming, shares
from argonne.data.mixture_resume import mixture_start, one_of_mixture, plan_mixture, source_state
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
from argonne.data.token_cache import CachedSource
from argonne.data.token_stream import open_shards, source_by_columns, with_vocabulary
from argonne.data.tokenizer import EncoderRecipe, load_tokenizer, tokenizer_fingerprint

__all__ = [
    "DataPosition",
    "DataProgress",
    "HeldOutSet",
    "MixPart",
    "OpenedStream",
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
    "load_tokenizer",
    "open_stream",
    "read_held_out",
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
    ``data_state`` (None in a pipeline checkpoint). Raises DataError before anything is tokenized.
    """
    options = with_vocabulary(options, tokenizer)
    if options.mix:
        return _open_mixture(options, tokenizer, saved_position, saved_state, global_step)
    options, shards, notices = _check_corpus(options)
    if saved_position is not None and "mixture" in saved_position:
        saved_position, saved_state, remarks = one_of_mixture(
            saved_position, saved_state, shards, options.allow_data_change
        )
        notices += remarks
    identity = source_identity(options, tokenizer)
    if saved_state is not None:
        notices += check_identity(saved_state, identity, options.allow_data_change)
    progress, remarks = resume(options, shards, saved_position, saved_state, global_step)
    recipe = EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code)
    pool = _pool(recipe, [options])
    return OpenedStream(
        source=SingleSource(
            _build_source(shards, recipe, pool, identity, options, progress), options.samples_per_step
        ),
        corpora={"": shards},
        identity=identity,
        notices=(*notices, *remarks),
        start=progress,
    )


def held_out_options(options: SourceOptions) -> dict[str, SourceOptions]:
    """How to open what ``--holdout`` keeps out of training, by the source's name ("" of the only one).

    The held-out documents as a packed stream in their natural order; ``open_stream`` without a saved place
    begins at its first document.
    """
    part = replace(options, held_out=True, shuffle=False, streaming=True, packing=True, mix=())
    if not options.mix:
        return {"": part}
    return {source.name: source_by_columns(part, source.glob) for source in options.mix}


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


def _open_mixture(
    options: SourceOptions,
    tokenizer: Any,
    saved_position: Mapping[str, Any] | None,
    saved_state: Mapping[str, Any] | None,
    global_step: int,
) -> OpenedStream:
    own, corpora, notices = {}, {}, []
    for name, _, data_glob in options.mix:
        with naming(name):
            own[name], corpora[name], remarks = _check_corpus(source_by_columns(options, data_glob))
        notices += [f"source {name!r}: {remark}" for remark in remarks]
    identity = source_identity(options, tokenizer)
    if saved_state is not None:
        notices += check_identity(saved_state, identity, options.allow_data_change)
    plan = plan_mixture(options.mix, corpora, saved_position, saved_state, options.allow_data_change)
    notices += plan.notices
    begun: dict[str, DataProgress] = {}
    for name, its_options in own.items():
        position, state = source_state(name, plan, saved_state)
        with naming(name):
            begun[name], remarks = resume(its_options, corpora[name], position, state, global_step)
        notices += [f"source {name!r}: {remark}" for remark in remarks]
    weights = {part.name: part.weight for part in options.mix}
    start = mixture_start(weights, begun, plan, saved_state)
    recipe = EncoderRecipe(tokenizer=tokenizer, trust_remote_code=options.trust_remote_code)
    pool = _pool(recipe, own.values())
    share = shares(weights)
    sources = {
        name: _build_source(corpora[name], recipe, pool, identity, own[name], begun[name], share[name])
        for name in own
    }
    return OpenedStream(
        source=MixtureSource(sources, start, options.samples_per_step, options.block_size),
        corpora=corpora,
        identity=identity,
        notices=tuple(notices),
        start=start,
    )
