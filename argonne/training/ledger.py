"""Steps in the order in which they end: on a GPU a step's totals are read when the next has been started.

So the host never waits for the step that it has just given to the device, and the device always has work.
Decisions and records are the same as where each step is read at once; a record is written one step later, and
a rank's wish to stop is seen one step later. Before anything else looks at the run (a validation, a sample, a
checkpoint, the end), the last step is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from argonne.training.between_steps import is_anything_due
from argonne.training.rewind import rewind_if_asked
from argonne.training.state import Advance, Run, stopwatch
from argonne.training.step import StartedStep, Votes
from data_stream import StepBatch


@dataclass(frozen=True, kw_only=True)
class _OpenStep:
    started: StartedStep
    advance: Advance
    since: float
    """When the loop turned to it."""


class StepLedger:
    """Starts and ends the steps of one loop over ``run``."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._open: _OpenStep | None = None
        self._ended = 0.0

    def take(self, batch: StepBatch, votes: Votes, *, since: float) -> Votes | None:
        """Start a step; end the one before it, or this one too where something is due after it; collective.

        Args:
            votes: this rank's.
            since: `stopwatch` when the loop turned to this step.

        Returns:
            All ranks' votes that have come in. None: the run went back from a spike, and the step is void.
        """
        run = self._run
        started = run.one_step.start(batch, run.stage_step, votes=votes)
        if not run.one_step.reads_late:
            result = run.one_step.finish(started)
            if rewind_if_asked(run, batch, result):
                return None
            run.complete(batch, result, stopwatch() - since)
            return result.votes
        before = self.settle()
        self._open = _OpenStep(started=started, advance=run.advance(batch), since=since)
        if before.stop or before.spoiled or before.failed or is_anything_due(run):
            return before.and_of(self.settle())
        return before

    def settle(self) -> Votes:
        """End the step that is still open, if there is one; the votes in it."""
        if self._open is None:
            return Votes()
        step, self._open = self._open, None
        result = self._run.one_step.finish(step.started)
        now = stopwatch()
        seconds, self._ended = now - max(step.since, self._ended), now
        self._run.record(step.advance, result, seconds)
        return result.votes
