"""When to save, between two steps or in the background, and how a save ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.config.options import RunConfig
from argonne.errors import CheckpointError
from argonne.files import OutputFolder
from argonne.ranks.agree import broadcast_object
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from argonne.training.build import TrainedModel
from argonne.training.saving import Saver, choose_saving
from argonne.training.step import Votes
from argonne.training.trust import Trust
from checkpointing import SaveReport, checkpoint_path


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A save that goes on in the background."""

    step: int
    path: Path
    facts: Mapping[str, Any]
    """What the statistics say of the step that is saved."""
    held: float
    """Seconds that the loop was held up to begin it."""


class CheckpointKeeper:
    """All ranks take part in a save; rank 0 writes, verifies and prunes.

    With ``--async-checkpoint`` a save that is due copies the model and is written while training goes on.
    It then lands: at the first boundary after its end its checkpoint is recorded and verified, or its error
    is raised. To be made on all ranks together.
    """

    def __init__(
        self,
        trained: TrainedModel,
        config: RunConfig,
        control: RunControl,
        report: RunReport,
    ) -> None:
        self._trained = trained
        self._interval = config.checkpoint.checkpoint_interval
        self._folder = OutputFolder(Path(config.output.output_dir)).pretrained
        self._control = control
        self._report = report
        self.mode = choose_saving(config.checkpoint.async_checkpoint, trained, control)
        """How checkpoints are written, and why so."""
        self._saver = Saver(trained, control.progress.pulse, background=self.mode.background)
        self._begun: _Begun | None = None
        self._trust = Trust(config.checkpoint, self._folder, control, report)
        self.newest: Path | None = None
        """The newest checkpoint that this run wrote and that has its name."""
        self._postponed = False
        self._since = time.monotonic()
        self._held = 0.0

    def keep_for_good(self, steps: Sequence[int]) -> None:
        """The checkpoints after these steps are never pruned."""
        self._trust.lasting = tuple(steps)

    # ---------------------------------------------------------------- between steps

    def votes(self, *, stop: bool) -> Votes:
        """This rank's votes in the next step, where it was asked to ``stop`` or not.

        Takes in what has ended in the background since the last time.
        """
        spoiled, running = self.spoiled(), self._saver.running
        if running.done and not running.failed:
            self._land()
        self._trust.go_on()
        return Votes(stop=stop, busy=self.busy, spoiled=spoiled, failed=running.failed)

    @property
    def busy(self) -> bool:
        """Rank 0 is still verifying its last checkpoint."""
        return self._trust.busy

    def spoiled(self) -> bool:
        """Whether rank 0 found its last checkpoint spoiled and wants another at once; warns when it does."""
        return self._trust.spoiled()

    def due(self, step: int, votes: Votes) -> bool:
        """Whether to save after ``step`` steps; postponed while the last checkpoint is still being verified.

        ``votes``: those of all ranks, so that all decide alike.
        """
        due = step % self._interval == 0 or self._postponed or votes.spoiled
        if due and votes.busy:
            if not self._postponed:
                self._report.warn(
                    "checkpoint postponed: the previous one is still being verified; "
                    "--checkpoint-interval is short for this disk",
                    f"(step {step})",
                )
            self._postponed = True
            return False
        return due

    def take_held_seconds(self) -> float:
        """How long saves have held up the loop since this was last asked."""
        held, self._held = self._held, 0.0
        return held

    # ---------------------------------------------------------------- saving

    def save(self, step: int, metadata: Mapping[str, Any], *, whole: bool = True) -> Path:
        """Write the checkpoint after ``step`` steps; collective. Raises CheckpointError on all ranks.

        The save in the background is waited for. ``whole``: return when the file is whole and has its name;
        else it may go on in the background.
        """
        path, started = checkpoint_path(self._folder, step), time.monotonic()
        self.spoiled()
        report = None
        self.wait()
        with self._control.phase("save"):
            if whole or not self._saver.background:
                report = self._saver.save(path, metadata)
            else:
                self._saver.begin(path, metadata)
        self._postponed = False
        held = time.monotonic() - started
        self._held += held
        begun = _Begun(step=step, path=path, facts=self._report.facts(), held=held)
        if self._saver.running.in_flight:
            self._begun = begun
            self._control.record(saving=step)
        else:
            self._landed(begun, report, background=False)
        return path

    def wait(self) -> None:
        """Wait for the save in the background; collective. Raises its error, the same on all ranks."""
        if self._saver.running.in_flight:
            with self._control.phase("save"):
                self._land()

    def _land(self) -> None:
        report = self._saver.running.wait()
        assert self._begun is not None
        begun, self._begun = self._begun, None
        self._landed(begun, report, background=True)

    def _landed(self, begun: _Begun, report: SaveReport | None, *, background: bool) -> None:
        self.newest = begun.path
        if report is None:
            return
        cost = begun.held if background else report.seconds
        share = cost / max(time.monotonic() - self._since, cost, 1e-9)
        self._since = time.monotonic()
        self._report.checkpoint_saved(
            begun.step,
            begun.path,
            bytes=report.size,
            seconds=report.seconds,
            share=share,
            facts=begun.facts,
            background=background,
        )
        if background:
            self._control.record(checkpoint=str(begun.path), saving=None)
        else:
            self._control.record(checkpoint=str(begun.path), step=begun.step)
        self._trust.verify(begun.path)

    # ---------------------------------------------------------------- trust

    def close(self, save_again: Callable[[], object]) -> None:
        """Wait until the last checkpoint has been verified; where it is damaged, ``save_again``.

        Collective. Raises CheckpointError on all ranks where the disk spoils that one too.
        """
        problem = self._proven()
        if problem is None:
            return
        self._report.warn(f"{problem}; earlier checkpoints were kept, and it is written again")
        save_again()
        problem = self._proven()
        if problem is not None:
            self._trust.tell()
            raise problem

    def sound_checkpoint(self, resumed_from: Path | None) -> Path | None:
        """The newest checkpoint that has been verified, or else the one resumed from; collective.

        The save and the verification under way are waited for.
        """
        if self._proven() is not None:
            self._trust.note_spoiled()
            self._report.warn("the last checkpoint is spoiled; earlier checkpoints were kept")
            self._postponed = True
        found: Path | None = broadcast_object(self._trust.verified or resumed_from, self._trained.parallel)
        return found

    def _proven(self) -> CheckpointError | None:
        """Wait for what is written and verified; what is wrong with the last checkpoint, on all ranks."""
        self.wait()
        with self._control.phase("save"):
            problem: CheckpointError | None = broadcast_object(self._trust.wait(), self._trained.parallel)
        return problem
