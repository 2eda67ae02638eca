"""Which steps of a run saw a document: its place in the order of the data, between the recorded positions.

The metrics hold where the data stood after every step, so that nothing is tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from argonne.config.options import RunConfig
from argonne.config.recipe import Recipe
from argonne.data.order import NaturalOrder, Order
from argonne.data.shards import Shard
from argonne.data.source import SourceOptions
from argonne.data.token_stream import open_shards, source_by_columns
from argonne.errors import ConfigError, DataError
from argonne.tools.kept_run import KeptRun
from argonne.training.data_places import data_source
from argonne.training.setup import source_options

Place = tuple[int, int, int]
"""Epoch, the shard's number in the epoch's order, the row's number in the shard's order."""


class Wanted(NamedTuple):
    """What is looked for: a row of a shard, or (row None) any row of it."""

    shard: str
    row: int | None


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A step that trained on it."""

    step: int
    source: str
    epoch: int


@dataclass(eq=False, kw_only=True)
class SourceOrder:
    """The rows of one source in the order in which each epoch takes them."""

    name: str
    shards: Sequence[Shard]
    order: Order
    _ranks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def number(self, shard: str) -> int | None:
        """Of a shard in the natural order; None where the source has none of this name."""
        return next((i for i, known in enumerate(self.shards) if known.name == shard), None)

    def place(self, epoch: int, shard: int, row: int) -> Place:
        """Where a row stands in an epoch."""
        return (epoch, self.rank_of_shard(epoch, shard), self._rank_of_row(epoch, shard, row))

    def rank_of_shard(self, epoch: int, shard: int) -> int:
        """Where a shard stands in an epoch."""
        return list(self.order.shards(epoch, len(self.shards))).index(shard)

    def first(self) -> Mapping[str, Any]:
        """The position before the first step."""
        index, row = self.order.first(0, self.shards)
        return {"epoch": 0, "file_name": self.shards[index].name, "row": row, "token_offset": 0}

    def _rank_of_row(self, epoch: int, shard: int, row: int) -> int:
        if isinstance(self.order, NaturalOrder):
            return row
        key = (epoch, shard)
        if key not in self._ranks:
            held = self.shards[shard]
            groups = [
                held.first_rows[group] + (np.arange(held.group_rows[group]) if rows is None else rows)
                for group, rows in self.order.groups(epoch, shard, held, None)
            ]
            rows = np.concatenate(groups) if groups else np.empty(0, np.int64)
            self._ranks[key] = np.argsort(rows)
        ranks = self._ranks[key]
        return int(ranks[row]) if row < len(ranks) else row


def orders_of(config: RunConfig) -> dict[str, SourceOrder]:
    """The sources of a stage by name, "" of the only one. Raises ConfigError where no order is recorded."""
    if not config.data.streaming:
        raise ConfigError("the run used --no-streaming, whose blocks remember no document: no step is found")
    if not config.data.packing:
        raise ConfigError("the run used --no-packing, which drops what its positions pass: no step is found")
    return {
        name: SourceOrder(name=name, shards=shards, order=options.order)
        for name, (options, shards) in open_parts(config).items()
    }


def open_parts(config: RunConfig) -> dict[str, tuple[SourceOptions, list[Shard]]]:
    """Options and shards of each source by its name, "" of the only one; no index is written."""
    options = replace(source_options(config, samples_per_step=1), cache_dir=None)
    if not options.mix:
        return {"": open_shards(options)}
    return {part.name: open_shards(source_by_columns(options, part.glob)) for part in options.mix}


def sights(run: KeptRun, recipe: Recipe, wanted: Sequence[Wanted]) -> Iterator[Sight]:
    """The steps that trained on any of ``wanted``, ascending.

    A step sees a document when one of its tokens is an input or the target of an input. Raises DataError
    where the records have a gap, ConfigError where no source has such a shard or row.
    """
    stages = {stage.name: stage.config for stage in recipe.stages}
    passed = _ways_back(run)
    known: dict[str, dict[str, SourceOrder]] = {}
    last: dict[tuple[str, str], Mapping[str, Any]] = {}
    before_step = 0
    for record in run.records():
        step, stage = int(record["step"]), str(record.get("stage") or "")
        if step != before_step + 1:
            raise DataError(
                f"{run.output.metrics} has no line of step {before_step + 1}: restore it, or look in the run "
                "that this one was continued from"
            )
        before_step = step
        config = stages.get(stage)
        if config is None:
            raise ConfigError(f"{run.output.run_config} has no stage {stage!r}, which step {step} is of")
        if stage not in known:
            known[stage] = orders_of(config)
            _require_known(known[stage], wanted, run)
        key = "" if config.data.data_mix else data_source(config)["key"]
        spike = record.get("spike") or {}
        for name, after in _positions(record).items():
            order = known[stage].get(name)
            if order is None:
                continue
            before = last.get((key, name)) or order.first()
            if "back_to_step" in spike and (jump := passed.get(int(spike["step"]))) is not None:
                before = jump.get(name, before)
            last[key, name] = after
            if not record.get("skipped") and after != before:
                yield from (
                    Sight(step=step, source=name, epoch=epoch)
                    for epoch in _epochs_seen(order, wanted, before, after)
                )


def _positions(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    place = record.get("data_position")
    if not isinstance(place, dict):
        raise DataError(f"step {record['step']} has no data_position in its metrics: no document is found")
    sources = place.get("sources")
    return dict(sources) if isinstance(sources, dict) else {"": place}


def _ways_back(run: KeptRun) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Step of a spike -> where the data went on after the run had gone back from it."""
    found = {}
    if run.output.spikes.is_file():
        for line in run.output.spikes.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("action") == "rewind":
                step = int(record["step"])
                found[step] = _positions({"step": step, "data_position": record["data_after"]})
    return found


def _require_known(orders: Mapping[str, SourceOrder], wanted: Sequence[Wanted], run: KeptRun) -> None:
    for shard, row in wanted:
        held = [
            order.shards[number] for order in orders.values() if (number := order.number(shard)) is not None
        ]
        if not held:
            names = sorted({known.name for order in orders.values() for known in order.shards})[:3]
            raise ConfigError(f"{shard} is no shard of {run.folder}: it reads {', '.join(names)}, ...")
        if row is not None and all(row >= one.rows for one in held):
            raise ConfigError(f"{shard} has {held[0].rows} rows (from 0), and no row {row}")


def _epochs_seen(
    order: SourceOrder, wanted: Sequence[Wanted], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[int]:
    """The epochs in which the stretch between two positions holds one of ``wanted``."""
    first, last = (_place_of(order, position) for position in (before, after))
    found = []
    for epoch in range(first[0], last[0] + 1):
        for shard, row in wanted:
            number = order.number(shard)
            if number is None:
                continue
            if row is None:
                rank = (epoch, order.rank_of_shard(epoch, number))
                seen = first[:2] <= rank <= last[:2]
            else:
                seen = first <= order.place(epoch, number, row) <= last
            if seen:
                found.append(epoch)
                break
    return found


def _place_of(order: SourceOrder, position: Mapping[str, Any]) -> Place:
    number = order.number(str(position["file_name"]))
    if number is None:
        raise DataError(f"{position['file_name']} is gone from the data (--data-glob): restore it")
    return order.place(int(position["epoch"]), number, int(position["row"]))
