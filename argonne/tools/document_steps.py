"""Which steps of a run saw a document: its place in the order of the data, between the recorded positions.

The metrics hold where the data stood after every step, and which list of excluded documents was in force, so
that the corpus is not tokenized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from argonne.config.options import RunConfig
from argonne.config.recipe import Recipe
from argonne.data.cached_source import CachedSamples
from argonne.data.shards import Shard
from argonne.data.source import SourceOptions
from argonne.data.token_cache import find_cache
from argonne.data.tokenizer import tokenizer_fingerprint
from argonne.errors import ConfigError, DataError
from argonne.tools.document_sights import (
    CachedSights,
    Sights,
    StreamSights,
    Wanted,
    WindowSights,
    number_of,
)
from argonne.tools.kept_run import KeptRun
from argonne.tools.rewinds import WaysBack, positions_of
from argonne.training.data_places import data_source
from argonne.training.exclusion import kept_exclusion
from argonne.training.setup import source_options
from data_stream import load_tokenizer, open_sources


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A step that trained on it."""

    step: int
    source: str
    epoch: int


def open_parts(config: RunConfig) -> dict[str, tuple[SourceOptions, list[Shard]]]:
    """Options and shards of each source by its name, "" of the only one; nothing is left out or written."""
    return open_sources(replace(source_options(config, samples_per_step=1), cache_dir=None, exclude=None))


class _Lists:
    """The lists of excluded documents that the metrics name."""

    def __init__(self, run: KeptRun) -> None:
        self._run = run
        self._known: dict[tuple[str, str, str], dict[int, frozenset[int]]] = {}

    def rows(
        self, digest: str, stage: str, source: str, shards: Sequence[Shard]
    ) -> dict[int, frozenset[int]]:
        """The rows of a source that a list names."""
        key = digest, stage, source
        if key not in self._known:
            exclusion = kept_exclusion(self._run.output, digest)
            self._known[key] = exclusion.by_number(source, shards)
        return self._known[key]


class Ledger:
    """The steps of a run and what of its data they took."""

    def __init__(self, run: KeptRun, recipe: Recipe) -> None:
        self._run = run
        self._stages = {stage.name: stage.config for stage in recipe.stages}
        self._sources: dict[str, dict[str, Sights]] = {}
        self._lists = _Lists(run)
        self._back = WaysBack(run.output)

    def sights(self, wanted: Sequence[Wanted]) -> Iterator[Sight]:
        """The steps that trained on any of ``wanted``, ascending.

        A step sees a document when one of its tokens is an input or the target of an input. Raises DataError
        where the records have a gap.
        """
        last: dict[tuple[str, str], Mapping[str, Any]] = {}
        before_step = 0
        for record in self._run.records():
            step, stage = int(record["step"]), str(record.get("stage") or "")
            if step != before_step + 1:
                raise DataError(
                    f"{self._run.output.metrics} has no line of step {before_step + 1}: restore it, or look "
                    "in the run that this one was continued from"
                )
            before_step = step
            sources = self._of_stage(stage, record)
            config = self._stages[stage]
            key = "" if config.data.data_mix else data_source(config)["key"]
            jump = self._back.place_of(record) or {}
            for name, after in positions_of(record).items():
                if name not in sources:
                    continue
                before = jump.get(name) or last.get((key, name)) or sources[name].first()
                last[key, name] = after
                if record.get("skipped") or _same(before, after):
                    continue
                digest = str(record.get("excluded_list") or "")
                excluded = self._lists.rows(digest, stage, name, sources[name].shards) if digest else {}
                mine = [one for one in wanted if one.source in (None, name)]
                epochs = {
                    epoch for one in mine for epoch in sources[name].epochs(one, before, after, excluded)
                }
                yield from (Sight(step=step, source=name, epoch=epoch) for epoch in sorted(epochs))

    def _of_stage(self, stage: str, first: Mapping[str, Any]) -> dict[str, Sights]:
        """The sources of a stage by name; ``first``: its first record."""
        config = self._stages.get(stage)
        if config is None:
            raise ConfigError(
                f"{self._run.output.run_config} has no stage {stage!r}, which step {first['step']} is of"
            )
        if stage not in self._sources:
            self._sources[stage] = dict(self._open(config, stage, str(first.get("excluded_list") or "")))
        return self._sources[stage]

    def _open(self, config: RunConfig, stage: str, digest: str) -> Iterator[tuple[str, Sights]]:
        data = config.data
        tokenizer = None
        if not (data.streaming and data.packing):
            tokenizer = load_tokenizer(data.tokenizer_path, data.trust_remote_code)
        for name, (options, shards) in open_parts(config).items():
            if data.streaming:
                yield name, (StreamSights if data.packing else WindowSights)(options, shards, tokenizer)
                continue
            cache = data.data_cache_dir or str(self._run.output.cache)
            made = replace(options, cache_dir=type(self._run.folder)(cache))
            if digest:  # the cache lacks what was excluded when its first step was taken
                made = replace(made, excluded=self._lists.rows(digest, stage, name, shards))
            samples = CachedSamples(find_cache(shards, tokenizer_fingerprint(tokenizer), made), shards, made)
            yield name, CachedSights(samples, shards)


def sights(run: KeptRun, recipe: Recipe, wanted: Sequence[Wanted]) -> Iterator[Sight]:
    """As `Ledger.sights`, of a run; ConfigError for a shard or row that none of its stages reads."""
    require_known(run, recipe, wanted)
    return Ledger(run, recipe).sights(wanted)


def _same(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    keys = {"epoch", "file_name", "row", "token_offset", "current_position"} & set(before) & set(after)
    return all(before[key] == after[key] for key in keys)


def require_known(run: KeptRun, recipe: Recipe, wanted: Sequence[Wanted]) -> None:
    """ConfigError for a shard, or a row, that no stage's data has."""
    parts = [part for stage in recipe.stages for part in open_parts(stage.config).items()]
    for shard, row, source in wanted:
        held = [
            shards[number]
            for name, (_, shards) in parts
            if source in (None, name) and (number := number_of(shards, shard)) is not None
        ]
        if not held:
            names = sorted({known.name for _, (_, shards) in parts for known in shards})[:3]
            raise ConfigError(f"{shard} is no shard of {run.folder}: it reads {', '.join(names)}, ...")
        if row is not None and all(row >= one.rows for one in held):
            raise ConfigError(f"{shard} has {held[0].rows} rows (from 0), and no row {row}")
