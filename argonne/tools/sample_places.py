"""A stream of samples with the place at which each begins."""

from __future__ import annotations

from collections import deque

import numpy as np

from argonne.data.source import DataProgress, SourceStep, TokenSource
from argonne.tools.target_writer import SamplePlace


class SampleByPlace:
    """Steps of ``count`` samples out of a source of single ones, which it notes the places of."""

    def __init__(self, source: TokenSource, start: DataProgress, count: int) -> None:
        self._source, self._before, self._count = source, start, count
        self.taken: deque[tuple[SamplePlace, DataProgress]] = deque()
        """Of each sample its place, and where the stream stands after it; read by another thread."""

    def next_step(self) -> SourceStep:
        steps = [self._one() for _ in range(self._count)]
        starts = [step.starts for step in steps if step.starts is not None]
        return SourceStep(
            tokens=np.concatenate([step.tokens for step in steps]),
            progress=steps[-1].progress,
            starts=np.concatenate(starts) if starts else None,
        )

    def _one(self) -> SourceStep:
        step = self._source.next_step()
        number = 0 if step.sources is None else int(step.sources[0])
        position = list(self._before.positions.values())[number]
        self._before = step.progress
        self.taken.append((SamplePlace(number, position), step.progress))
        return step

    def close(self) -> None:
        self._source.close()
