"""The learning rate by optimizer step: warm-up, then cosine, WSD, linear or constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from argonne.config.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A schedule over ``total_steps`` optimizer steps; steps count from 0.

    All kinds warm up linearly from ``minimum`` to ``peak``. Then ``cosine`` falls to ``minimum`` at the end
    (Loshchilov and Hutter 2017), ``linear`` in a straight line, ``constant`` stays, and ``wsd`` stays until
    ``cooldown_steps`` before the end and falls from there in a straight line (Hu et al. 2024, MiniCPM).
    """

    kind: str
    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int
    cooldown_steps: int = 0
    """Of ``wsd``."""

    @classmethod
    def of(cls, options: TrainingOptions) -> Schedule:
        """The schedule that a run was asked for; its steps are known (``derive_steps``)."""
        return cls(
            kind=options.lr_schedule,
            peak=options.learning_rate,
            minimum=options.min_learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=options.total_steps,
            cooldown_steps=options.cooldown_steps or 0,
        )

    def __str__(self) -> str:
        steps = f"{self.total_steps:,} steps, {self.warmup_steps:,} of warm-up"
        if self.kind == "wsd":
            steps += f", {self.cooldown_steps:,} of cooldown"
        return f"{self.kind}, {self.peak:g} to {self.minimum:g} over {steps}"

    def rate(self, step: int) -> float:
        """Learning rate of the update of step ``step``."""
        if step < self.warmup_steps:
            return self.minimum + (self.peak - self.minimum) * step / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        if self.kind == "wsd":
            start = max(self.warmup_steps, self.total_steps - self.cooldown_steps)
            return self._fallen(min(1.0, max(0, step - start) / max(1, self.cooldown_steps)))
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        if self.kind == "linear":
            return self._fallen(progress)
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def _fallen(self, share: float) -> float:
        return self.peak - (self.peak - self.minimum) * share
