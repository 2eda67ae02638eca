"""A profile of some steps, and a garbage collector that never runs in a step at random.

``--profile START:STEPS`` records a trace of the steps START ... START + STEPS - 1 (counted from 1, as the
metrics do) on every rank, for chrome://tracing or Perfetto, and on CUDA a snapshot of the allocator's
history for pytorch.org/memory_viz.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from argonne.config.flags import window_of
from argonne.config.run_options import OutputOptions
from argonne.files import OutputFolder
from argonne.ranks.world import Parallel

Interval = tuple[float, float]
"""(begin, end) in microseconds."""
COLLECT_EVERY = 1000
"""Optimizer steps between collections of the youngest objects; a step makes hardly any cycles."""
_COMMUNICATION = ("nccl", "gloo:", "mpi:", "ucc:")
_WAITING = ("c10d::", "_c10d_functional::", "record_param_comms")


class GarbageControl:
    """Python's garbage collector, between steps instead of in them.

    What stands at the loop's begin is frozen (never looked at again); from then on the collector runs when
    it is called, at the same steps on all ranks, so that no rank makes the others wait.
    """

    def begin(self) -> None:
        """The loop begins."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self, step: int) -> None:
        """``step`` optimizer steps are complete."""
        if step % COLLECT_EVERY == 0:
            gc.collect(1)

    def end(self) -> None:
        """As it was."""
        gc.enable()
        gc.unfreeze()


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Parts of the profiled time; they add up to 1."""

    compute: float
    exposed_communication: float
    """Collectives under way while nothing is computed."""
    idle: float

    def line(self) -> str:
        """One line for the console."""
        return (
            f"compute {self.compute:.1%}, exposed communication {self.exposed_communication:.1%}, "
            f"idle {self.idle:.1%}"
        )


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, in order and apart."""
    result: list[Interval] = []
    for begin, end in sorted(intervals):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    """Microseconds in a union of intervals."""
    return sum(end - begin for begin, end in merged(intervals))


def shares(compute: Sequence[Interval], communication: Sequence[Interval]) -> Shares:
    """What a timeline spends its time on, from its first to its last interval."""
    everything = merged([*compute, *communication])
    if not everything:
        return Shares(compute=0.0, exposed_communication=0.0, idle=1.0)
    whole = everything[-1][1] - everything[0][0] or 1.0
    computing, busy = length(compute), length(everything)
    return Shares(
        compute=computing / whole,
        exposed_communication=(busy - computing) / whole,
        idle=1.0 - busy / whole,
    )


def timeline(events: Iterable[Any], *, on_device: bool) -> tuple[list[Interval], list[Interval]]:
    """Intervals of computing and of communicating among a profiler's events.

    On a GPU its kernels and copies; on a CPU the operators of the threads that compute, collectives being
    what the backend's threads record.
    """
    compute: list[Interval] = []
    communication: list[Interval] = []
    for event in events:
        if (event.device_type == torch.autograd.DeviceType.CUDA) != on_device:
            continue
        name = event.name.lower()
        interval = (float(event.time_range.start), float(event.time_range.end))
        if any(word in name for word in _COMMUNICATION):
            communication.append(interval)
        elif on_device or (name.startswith(("aten::", "mkldnn::")) and not name.startswith(_WAITING)):
            compute.append(interval)
    return compute, communication


class StepProfiler:
    """Profiles the steps of ``--profile START:STEPS``; nothing without it.

    Args:
        window: ``START:STEPS``, steps counted from 1; None: no profile.
        folder: where the traces go; made when they are written.
        rank: of this process, in the file's name.
        device: of the run.
    """

    def __init__(
        self,
        window: str | None = None,
        *,
        folder: Path = Path(),
        rank: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._first = self._last = 0
        if window is not None:
            self._first, steps = window_of(window)
            self._last = self._first + steps - 1
        self._folder, self._rank = folder, rank
        self._on_device = device is not None and device.type == "cuda"
        self._profile: Any = None

    @classmethod
    def of(cls, options: OutputOptions, parallel: Parallel) -> StepProfiler:
        """The one that ``--profile`` asks for, on this rank."""
        folder = OutputFolder(Path(options.output_dir)).profile
        return cls(options.profile, folder=folder, rank=parallel.rank, device=parallel.device)

    def before_step(self, step: int) -> None:
        """Step number ``step`` (from 1) is about to begin."""
        if step != self._first or self._profile is not None:
            return
        activities = [ProfilerActivity.CPU]
        if self._on_device:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def after_step(self, step: int) -> str | None:
        """Step number ``step`` is complete; after the last profiled one the line that says what was found."""
        if self._profile is None or step != self._last:
            return None
        self._stop()
        found = shares(*timeline(self._profile.events(), on_device=self._on_device))
        said = f"Profile of steps {self._first} to {self._last} (rank {self._rank}): {found.line()}"
        try:
            said = f"{said}; {self._write()}"
        except OSError as error:
            said = f"{said}; no trace, for {self._folder} cannot be written ({error.strerror})"
        self._profile, self._first = None, 0  # once, also where the run goes back over the same steps
        return said

    def close(self) -> None:
        """The run ends: a profile whose last step has not come is let go."""
        if self._profile is not None:
            self._stop()
            self._profile = None

    def _stop(self) -> None:
        if self._on_device:
            torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)

    def _write(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"trace_rank_{self._rank}.json"
        self._profile.export_chrome_trace(str(trace))
        if self._on_device:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_rank_{self._rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return trace
