"""Which rank stalled: how far the loops of all ranks have come, judged on the judge's own clock."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

from argonne.errors import rank_list

PATIENCE: Mapping[str, float] = {
    "start": float("inf"),  # a corpus may be tokenized for hours
    "load": float("inf"),
    "export": float("inf"),
    "save": 6.0,
    "verify": 6.0,
    "sample": 6.0,
    "validate": 6.0,
}
"""Stall timeouts that a live rank may spend in a phase without a mark (1 in a step); silence is not borne."""


def collective_limit(stall_timeout: float, least: float) -> float:
    """Seconds after which a collective may fail by itself: past the judge's longest finite patience, so that
    our line names the rank before NCCL's watchdog aborts; ``least`` where stalls are not judged (0)."""
    longest = max(patience for patience in PATIENCE.values() if math.isfinite(patience))
    return max(least, (longest + 1) * stall_timeout)


class Collectives(Protocol):
    """What a counter of the collectives that this rank issued tells."""

    last: str

    @property
    def total_calls(self) -> int: ...


class Progress:
    """Where the training loop stands; written by the loop, read by the watching threads."""

    def __init__(self) -> None:
        self.looping = False
        """the first step may begin: from then on a signal lets the step end and saves"""
        self.step = 0
        self.phase = "start"
        self.collectives: Collectives | None = None
        self._marks = 0

    def mark(self, phase: str, step: int | None = None) -> None:
        """The loop enters a phase, or has made progress in it."""
        self.phase = phase
        if step is not None:
            self.step = step
        self._marks += 1

    def pulse(self) -> None:
        """A save in the background goes on; it counts while the loop waits for it, and only then."""
        if self.phase == "save":
            self._marks += 1

    @property
    def work(self) -> int:
        """Grows with every mark and every collective."""
        return self._marks + (self.collectives.total_calls if self.collectives is not None else 0)

    @property
    def collective(self) -> str:
        """The last collective issued, such as ``all_reduce (number 152)``."""
        if self.collectives is None or not self.collectives.total_calls:
            return ""
        return f"{self.collectives.last} (number {self.collectives.total_calls})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """One sign of life of one rank."""

    number: int
    step: int
    phase: str
    work: int
    collective: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The ranks that hold up the run, and the line that says so."""

    ranks: tuple[int, ...]
    silent: bool
    """no sign of life at all: the process is stopped or its host is gone"""
    text: str


class StallJudge:
    """Decides from the beats, on the judge's own clock, which rank stalled."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._alive: dict[int, tuple[int, float]] = {}
        self._moved: dict[int, tuple[int, float]] = {}
        self._observed = float("-inf")

    def observe(self, beats: Mapping[int, Beat], at: float) -> Verdict | None:
        """The verdict on the newest beats at the time ``at`` (monotonic seconds); None: no one stalled."""
        if at - self._observed > self.timeout / 2:
            # The judge itself was away (a suspended job): what it has not seen is no one's fault.
            self._alive.clear()
            self._moved.clear()
        self._observed = at
        for rank, beat in beats.items():
            if self._alive.get(rank, (-1, 0.0))[0] != beat.number:
                self._alive[rank] = (beat.number, at)
            if self._moved.get(rank, (-1, 0.0))[0] != beat.work:
                self._moved[rank] = (beat.work, at)
        silent = [rank for rank in beats if at - self._alive[rank][1] > self.timeout]
        if silent:
            return self._verdict(silent, beats, silent=True, text="gave no sign of life")
        stuck = [rank for rank in beats if at - self._moved[rank][1] > self._limit(beats[rank])]
        # One rank holds up all: those it keeps waiting are stuck too, but further on. While any rank moves,
        # nothing is decided (rank 0 may be writing a checkpoint that the others wait for).
        if len(stuck) < len(beats):
            return None
        least = min((beats[rank].step, beats[rank].work) for rank in stuck)
        behind = [rank for rank in stuck if (beats[rank].step, beats[rank].work) == least]
        return self._verdict(behind, beats, silent=False, text="made no progress")

    def _limit(self, beat: Beat) -> float:
        return self.timeout * PATIENCE.get(beat.phase, 1.0)

    def _verdict(self, ranks: list[int], beats: Mapping[int, Beat], *, silent: bool, text: str) -> Verdict:
        first = beats[ranks[0]]
        after = f", after {first.collective}" if first.collective else ""
        return Verdict(
            ranks=tuple(sorted(ranks)),
            silent=silent,
            text=f"{rank_list(ranks)} {text} for {self.timeout:.0f} s (--stall-timeout), last seen in step "
            f"{first.step}, {first.phase}{after}: check that process and its host, then resume",
        )
