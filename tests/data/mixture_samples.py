"""Corpora of several sources, mixtures of them, and their samples by the definition."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import argonne.testing.corpus as corpus
from argonne.data.source import MixPart, SourceOptions
from argonne.testing.sources import source_options
from data_stream import OpenedStream
from tests.data.naive import Stream, mixture_order

WEIGHTS = {"web": "0.62", "code": "0.3", "books": "0.08"}


def write_sources(folder: Path) -> dict[str, Path]:
    """Four corpora of different texts and sizes, by name."""
    found = {}
    for number, (name, count) in enumerate({"web": 60, "code": 40, "books": 9, "math": 30}.items()):
        found[name] = folder / name
        corpus.write_shards(found[name], corpus.short_texts(count, 200, skip=100 * number), shards=1 + number)
    return found


def options_of(
    folders: Mapping[str, Path], weights: Mapping[str, str] = WEIGHTS, **changes: Any
) -> SourceOptions:
    mix = tuple(MixPart(name, weight, f"{folders[name]}/*.parquet") for name, weight in weights.items())
    return replace(source_options("unused"), mix=mix, **changes)


class Naive:
    """The samples of a mixture by the definition."""

    def __init__(
        self, folders: Mapping[str, Path], tokenizer: Any, weights: Mapping[str, str], seed: int | None = None
    ) -> None:
        self.streams = {name: Stream(folders[name], tokenizer, seed) for name in weights}
        self.weights = dict(weights)
        self.used: Counter[str] = Counter()

    def samples(self, count: int, block_size: int, done: int = 0) -> tuple[list[str], list[list[int]]]:
        """Those after ``done`` since the mixture began."""
        names, tokens = list(self.weights), []
        order = [names[i] for i in mixture_order(list(self.weights.values()), done + count)[done:]]
        for name in order:
            tokens.append(self.streams[name].sample(self.used[name], block_size))
            self.used[name] += 1
        return order, tokens


def run_steps(opened: OpenedStream, count: int) -> list[Any]:
    steps = [opened.source.next_step() for _ in range(count)]
    opened.source.close()
    return steps
