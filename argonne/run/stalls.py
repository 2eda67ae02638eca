"""Which rank stalled: how far the loops of all ranks have come, judged on the judge's own clock.

A loop may issue a whole step at once and a GPU may stall in the midst of it. Who stalled is then told by the
collectives that each rank's device has entered and completed.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupWork:
    """How far a rank's device has come in one process group; collectives are counted from 1."""

    group: str
    """what the group is for, such as ``mesh_tp``"""
    entered: int = 0
    """the last collective that it has begun, in which it waits for the others until they have, too"""
    completed: int = 0
    kind: str = ""
    """``all_reduce`` and so on: the one it is in, or the next"""


class Progress:
    """Where the training loop stands; written by the loop, read by the watching threads."""

    def __init__(self) -> None:
        self.looping = False
        """the first step may begin: from then on a signal lets the step end and saves"""
        self.step = 0
        self.phase = "start"
        self.collectives: Collectives | None = None
        self.completed_work: Callable[[], Mapping[str, GroupWork]] | None = None
        """tells of each process group how far the device has come; costly, asked where the loop stands"""
        self._marks = 0
        self._stood = (-1, 0.0)

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

    def device_work(self, patience: float) -> Mapping[str, GroupWork]:
        """How far the device has come in each process group, once the loop has stood for ``patience`` s.

        Before, nothing: it costs too much to be asked all the time. For one thread, every few seconds.
        """
        at, work = time.monotonic(), self.work
        if self._stood[0] != work:
            self._stood = (work, at)
        if self.completed_work is None or at - self._stood[1] <= patience:
            return {}
        return self.completed_work()

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
    groups: Mapping[str, GroupWork] = dataclasses.field(default_factory=dict)
    """of a rank whose loop has stood for a while: its progress in each process group, by name"""

    def text(self) -> str:
        """For the store."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> "Beat":
        """From what `text` gave."""
        fields = json.loads(text)
        groups = {name: GroupWork(**group) for name, group in fields.pop("groups", {}).items()}
        return cls(groups=groups, **fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The ranks that hold up the run, and the line that says so."""

    ranks: tuple[int, ...]
    silent: bool
    """no sign of life at all: the process is stopped or its host is gone"""
    text: str


def awaited_ranks(beats: Mapping[int, Beat]) -> tuple[list[int], str] | None:
    """The ranks for which others wait while they wait for no one, and where these wait.

    None where the devices' work does not tell: no rank is inside a collective, or each waits for another.
    """
    inside: dict[int, str] = {}
    awaited: list[tuple[set[int], list[int]]] = []
    for name in sorted({name for beat in beats.values() for name in beat.groups}):
        works = {rank: beat.groups[name] for rank, beat in beats.items() if name in beat.groups}
        last = max(work.entered for work in works.values())
        waiting = [rank for rank, work in works.items() if work.completed < work.entered]
        inside |= {r: f"{works[r].kind} {works[r].entered} of {works[r].group}" for r in waiting}
        first = sorted(rank for rank in waiting if works[rank].entered == last)
        late = {rank for rank, work in works.items() if work.entered < last}
        if first and late:
            awaited.append((late, first))
    for late, waiting in awaited:
        if behind := sorted(late - set(inside)):
            verb = "waits" if len(waiting) == 1 else "wait"
            return behind, f" while {rank_list(waiting)} {verb} in {inside[waiting[0]]}"
    if not awaited and len(inside) == len(beats) and len(set(inside.values())) == 1:
        return sorted(inside), f" in {inside[min(inside)]}, which all have entered and none has left"
    return None


class StallJudge:
    """Decides from the beats, on the judge's own clock, which rank stalled."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._alive: dict[int, tuple[int, float]] = {}
        self._moved: dict[int, tuple[Beat, float]] = {}
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
            before, since = self._moved.get(rank, (None, at))
            # Collectives of compiled code are counted by the device alone.
            moved = before is None or before.work != beat.work or before.groups not in ({}, beat.groups)
            self._moved[rank] = (beat, at if moved else since)
        silent = [rank for rank in beats if at - self._alive[rank][1] > self.timeout]
        if silent:
            return self._verdict(silent, beats, silent=True, text="gave no sign of life")
        stuck = [rank for rank in beats if at - self._moved[rank][1] > self._limit(beats[rank])]
        # One rank holds up all: those it keeps waiting are stuck too, but further on. While any rank moves,
        # nothing is decided (rank 0 may be writing a checkpoint that the others wait for).
        if len(stuck) < len(beats):
            return None
        if (found := awaited_ranks(beats)) is not None:
            ranks, place = found
            return self._verdict(ranks, beats, silent=False, text="made no progress", place=place)
        least = min((beats[rank].step, beats[rank].work) for rank in stuck)
        behind = [rank for rank in stuck if (beats[rank].step, beats[rank].work) == least]
        return self._verdict(behind, beats, silent=False, text="made no progress")

    def _limit(self, beat: Beat) -> float:
        return self.timeout * PATIENCE.get(beat.phase, 1.0)

    def _verdict(
        self, ranks: list[int], beats: Mapping[int, Beat], *, silent: bool, text: str, place: str = ""
    ) -> Verdict:
        first = beats[ranks[0]]
        after = f", after {first.collective}" if first.collective and not place else ""
        what = "that process, its GPU" if place else "that process"
        return Verdict(
            ranks=tuple(sorted(ranks)),
            silent=silent,
            text=f"{rank_list(ranks)} {text} for {self.timeout:.0f} s (--stall-timeout){place}, last seen in "
            f"step {first.step}, {first.phase}{after}: check {what} and its host, then resume",
        )
