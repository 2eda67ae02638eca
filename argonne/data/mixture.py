"""A mixture of sources: which one each sample comes from, and the steps made of them.

The n-th sample since the mixture began (n from 1) comes from the source with the largest weight x n - taken,
the weights adding up to 1; on a tie from the first named. The arithmetic is that of whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from argonne.data.documents import Counts
from argonne.data.position import DataPosition
from argonne.data.source import DataProgress, SampleSource, SourceStep, chain_hash
from argonne.errors import DataError

ROUND_TOKENS = 1 << 15
"""Tokens taken from the sources in turn: little enough that all of them keep the tokenizing workers busy."""


class MixtureRule:
    """Chooses the source of one sample after another."""

    def __init__(self, weights: Sequence[str], taken: Sequence[int] | None = None) -> None:
        """``weights``: decimal fractions above 0; ``taken``: samples of each source so far."""
        shares = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(share.denominator for share in shares))
        self._parts = [int(share * scale) for share in shares]
        self._whole = sum(self._parts)
        self.taken = list(taken) if taken is not None else [0] * len(shares)
        self._due = [
            part * self.n - self._whole * count for part, count in zip(self._parts, self.taken, strict=True)
        ]
        """(weight x n - taken) of each source, times ``_whole``."""

    @property
    def n(self) -> int:
        """Samples since the mixture began."""
        return sum(self.taken)

    def choose(self) -> int:
        """The source of the next sample, which counts as taken."""
        self._due = [due + part for due, part in zip(self._due, self._parts, strict=True)]
        source = self._due.index(max(self._due))
        self._due[source] -= self._whole
        self.taken[source] += 1
        return source


def shares(weights: Mapping[str, str]) -> dict[str, Fraction]:
    """The weights of a mixture, adding up to 1."""
    total = sum(Fraction(weight) for weight in weights.values())
    return {name: Fraction(weight) / total for name, weight in weights.items()}


@dataclass(frozen=True, kw_only=True)
class MixtureProgress(DataProgress):
    """The state of a mixture after a step. ``position`` is that of the first source.

    ``counts`` and ``samples`` are sums over all sources; entries of ``skipped`` name theirs.
    """

    weights: Mapping[str, str]
    """Of each source, as given; their order decides ties."""
    sources: Mapping[str, DataProgress]
    """Each source's own state; ``samples`` counts from step 0."""
    taken: Mapping[str, int]
    """Samples of each source since the mixture began."""
    tokens: Mapping[str, int]
    """Tokens of each source since step 0."""
    past: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sources that are no longer in the mixture: what a checkpoint says of them, should they return."""

    @property
    def n(self) -> int:
        """Samples since the mixture began."""
        return sum(self.taken.values())

    @property
    def positions(self) -> Mapping[str, DataPosition]:
        return {name: progress.position for name, progress in self.sources.items()}

    def _mixture(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "n": self.n}

    def metrics(self) -> dict[str, Any]:
        record: dict[str, Any] = {"stream_hash": self.stream_hash, **self.counts._asdict()}
        places = {
            name: {**progress.metrics()["data_position"], "samples": self.taken[name]}
            for name, progress in self.sources.items()
        }
        record["data_position"] = {"sources": places, "mixture": self._mixture()}
        record["samples_by_source"] = {
            **{name: progress.samples for name, progress in self.sources.items()},
            **{name: entry["samples"] for name, entry in self.past.items()},
        }
        record["tokens_by_source"] = {
            **self.tokens,
            **{name: entry["tokens"] for name, entry in self.past.items()},
        }
        record["epoch_by_source"] = {name: p.position.epoch for name, p in self.sources.items()}
        if self.skipped:
            record["skipped_row_groups"] = len(self.skipped)
        return record

    def position_dict(self, file_names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        places = {
            name: {**progress.position.to_dict(file_names[name]), "samples": self.taken[name]}
            for name, progress in self.sources.items()
        }
        return {"sources": places, "mixture": self._mixture()}

    def state_dict(self, manifests: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "stream_hash": self.stream_hash,
            "samples": self.samples,
            "counts": self.counts._asdict(),
            "skipped": [dict(skip) for skip in self.skipped],
            "sources": {
                name: {
                    "samples": progress.samples,
                    "tokens": self.tokens[name],
                    "counts": progress.counts._asdict(),
                    "manifest": manifests[name],
                }
                for name, progress in self.sources.items()
            },
            "past_sources": {name: dict(entry) for name, entry in self.past.items()},
        }


class MixtureSource:
    """The steps of several sources: each one's samples in their order, in the places that the rule gives."""

    def __init__(
        self,
        sources: Mapping[str, SampleSource],
        progress: MixtureProgress,
        samples_per_step: int,
        block_size: int,
    ) -> None:
        self._sources = dict(sources)
        self._progress = progress
        self._shape = (samples_per_step, block_size + 1)
        self._round = max(1, ROUND_TOKENS // block_size)
        taken = [progress.taken[name] for name in sources]
        self._rule = MixtureRule([progress.weights[name] for name in sources], taken)

    def next_step(self) -> SourceStep:
        count, length = self._shape
        chosen = np.array([self._rule.choose() for _ in range(count)], dtype=np.int32)
        tokens = np.empty((count, length), dtype=np.int32)
        starts: np.ndarray | None = None
        for start in range(0, count, self._round):
            places = chosen[start : start + self._round]
            for number, (name, source) in enumerate(self._sources.items()):
                here = np.flatnonzero(places == number)
                if len(here):
                    with naming(name):
                        taken = source.take(len(here))
                    tokens[start + here] = taken.tokens
                    if taken.starts is not None:
                        starts = np.zeros((count, length - 1), dtype=bool) if starts is None else starts
                        starts[start + here] = taken.starts
        self._advance(chosen, tokens)
        return SourceStep(tokens=tokens, progress=self._progress, sources=chosen, starts=starts)

    def _advance(self, chosen: np.ndarray, tokens: np.ndarray) -> None:
        before = self._progress
        counted = np.bincount(chosen, minlength=len(self._sources)).tolist()
        block_size = self._shape[1] - 1
        now = {name: source.progress for name, source in self._sources.items()}
        new_skips = [
            {"source": name, **skip}
            for name, progress in now.items()
            for skip in progress.skipped[len(before.sources[name].skipped) :]
        ]
        self._progress = replace(
            before,
            position=next(iter(now.values())).position,
            stream_hash=chain_hash(before.stream_hash, tokens),
            samples=before.samples + len(chosen),
            counts=sum_counts([progress.counts for progress in now.values()], before.past),
            skipped=(*before.skipped, *new_skips),
            sources=now,
            taken=dict(zip(now, self._rule.taken, strict=True)),
            tokens={
                name: before.tokens[name] + count * block_size
                for name, count in zip(now, counted, strict=True)
            },
        )

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


def sum_counts(counts: Sequence[Counts], past: Mapping[str, Mapping[str, Any]]) -> Counts:
    """Rows passed in all sources, past ones included."""
    every = [*counts, *(Counts(**entry["counts"]) for entry in past.values())]
    return Counts(*(sum(column) for column in zip(*every, strict=True)))


@contextmanager
def naming(source: str) -> Iterator[None]:
    """A DataError of one source names it, and the mixture's flag."""
    try:
        yield
    except DataError as error:
        message = str(error).replace("--data-glob", "--data-mix")
        raise DataError(f"source {source!r}: {message}") from error
