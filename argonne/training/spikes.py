"""Spikes of loss or gradient norm: a robust rule, and the record of what it did.

A value is a spike where it lies above the median of the last values by more than so many of their spreads,
the spread being the median absolute deviation (scaled to a normal distribution's standard deviation; Hampel
1974). Median and spread hardly move with the spikes themselves. All ranks judge the same reduced totals, so
they agree.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 200
"""Steps that the rule looks back on."""
LEAST = 50
"""Steps without a judgement at first: the loss still falls fast."""
_NORMAL = 1.4826
_FLOOR = 0.01
"""Least spread, relative to the median: a flat curve must not make noise a spike."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A value beyond the threshold."""

    quantity: str
    """``loss`` or ``grad_norm``."""
    value: float
    threshold: float

    def describe(self) -> str:
        """In a few words."""
        return f"{self.quantity} {self.value:.4g} above {self.threshold:.4g}"


class SpikeRule:
    """Judges each step by the steps before it; spikes do not enter the window.

    Args:
        deviations: spreads above the median that make a spike.
        most: spikes acted upon in a window; a run with more has another trouble, and is left alone.
    """

    def __init__(self, *, deviations: float = 10.0, most: int = 10) -> None:
        self._deviations, self._most = deviations, most
        self._values: dict[str, deque[float]] = {
            "loss": deque(maxlen=WINDOW),
            "grad_norm": deque(maxlen=WINDOW),
        }
        self._acted: deque[int] = deque()
        self._steps = 0

    def judge(self, values: Mapping[str, float]) -> Spike | None:
        """The first quantity of a step that is a spike; other finite values are remembered."""
        self._steps += 1
        while self._acted and self._acted[0] <= self._steps - WINDOW:
            self._acted.popleft()
        if len(self._acted) < self._most:
            for quantity, kept in self._values.items():
                value = values[quantity]
                if len(kept) >= LEAST and math.isfinite(value) and value > (limit := self._limit(kept)):
                    self._acted.append(self._steps)
                    return Spike(quantity=quantity, value=value, threshold=limit)
        for quantity, kept in self._values.items():
            if math.isfinite(values[quantity]):
                kept.append(values[quantity])
        return None

    def _limit(self, kept: deque[float]) -> float:
        middle = median(kept)
        spread = _NORMAL * median(abs(value - middle) for value in kept)
        return middle + self._deviations * max(spread, _FLOOR * abs(middle))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        kept = {quantity: list(values) for quantity, values in self._values.items()}
        return {"values": kept, "acted": list(self._acted), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave; an empty one leaves the rule at its beginning."""
        for quantity, values in (state.get("values") or {}).items():
            self._values[quantity] = deque(values, maxlen=WINDOW)
        self._acted = deque(state.get("acted") or ())
        self._steps = int(state.get("steps") or 0)
