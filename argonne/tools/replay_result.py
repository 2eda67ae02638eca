"""What a replayed step came to: its figures beside the recorded ones, and its documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from argonne.tools.step_documents import StepDocument


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a step, as recorded and as replayed."""

    name: str
    recorded: Any
    replayed: Any
    tolerance: float = 0.0

    @property
    def exact(self) -> bool:
        return bool(self.recorded == self.replayed)

    @property
    def same(self) -> bool:
        """Equal, or within the tolerance."""
        if self.exact:
            return True
        if not isinstance(self.recorded, float) or not isinstance(self.replayed, float):
            return False
        return math.isclose(self.recorded, self.replayed, rel_tol=self.tolerance)


@dataclass(frozen=True, kw_only=True)
class MeasuredDocument:
    """A document of the step with what the step's weights made of it."""

    document: StepDocument
    loss: float
    """Mean over its tokens in the step."""
    grad_norm: float
    """Of its share of the step's gradient: its tokens' losses, summed, over the step's tokens."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What became of it; documents on rank 0 only."""

    step: int
    checkpoint: str
    layout: str
    figures: tuple[Figure, ...]
    same_layout: bool
    documents: tuple[MeasuredDocument, ...]
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return all(figure.same for figure in self.figures)

    @property
    def exact(self) -> bool:
        return all(figure.exact for figure in self.figures)
