"""When to save, and when to trust what was saved: verify in the background, then prune the predecessors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from argonne.config.run_options import CheckpointOptions
from argonne.errors import CheckpointError
from argonne.files import OutputFolder
from argonne.ranks.agree import broadcast_object
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from argonne.training.build import TrainedModel
from argonne.training.step import Votes
from checkpointing import BackgroundVerifier, checkpoint_path, prune, save_checkpoint

_TRIES_AGAIN = 2
"""Spoiled checkpoints in a row that are saved again at once; a failing disk must not save at every step."""


class CheckpointKeeper:
    """All ranks take part in a save; rank 0 writes, verifies and prunes."""

    def __init__(
        self,
        trained: TrainedModel,
        options: CheckpointOptions,
        output_dir: Path,
        control: RunControl,
        report: RunReport,
    ) -> None:
        self._trained = trained
        self._options = options
        self._folder = OutputFolder(output_dir).pretrained
        self._control = control
        self._report = report
        self._verifier = BackgroundVerifier(self._prune)
        self.newest: Path | None = None
        """The newest checkpoint that this run wrote."""
        self._lasting: tuple[int, ...] = ()
        self._postponed = False
        self._since = time.monotonic()
        self._verified: Path | None = None
        self._spoiled: list[Path] = []
        self._spoiled_in_a_row = 0

    def keep_for_good(self, steps: Sequence[int]) -> None:
        """The checkpoints after these steps are never pruned."""
        self._lasting = tuple(steps)

    @property
    def busy(self) -> bool:
        """Rank 0 is still verifying its last checkpoint."""
        return self._verifier.busy

    def spoiled(self) -> bool:
        """Whether rank 0 found its last checkpoint spoiled and wants another at once; warns when it does."""
        problem = self._verifier.poll()
        if problem is None:
            return False
        self._tell_verified()
        if self.newest is not None:
            self._spoiled.append(self.newest)
        self._spoiled_in_a_row += 1
        again = self._spoiled_in_a_row <= _TRIES_AGAIN
        then = "another is saved at once" if again else "the next is saved when due: check this disk"
        self._report.warn(f"{problem}; earlier checkpoints were kept, and {then}")
        return again

    def due(self, step: int, votes: Votes) -> bool:
        """Whether to save after ``step`` steps; postponed while the last checkpoint is still being verified.

        ``votes``: those of all ranks, so that all decide alike.
        """
        due = step % self._options.checkpoint_interval == 0 or self._postponed or votes.spoiled
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

    def save(self, step: int, metadata: Mapping[str, Any]) -> Path:
        """Write the checkpoint after ``step`` steps; collective. Raises CheckpointError on all ranks."""
        trained = self._trained
        path = checkpoint_path(self._folder, step)
        self.spoiled()
        with self._control.phase("save"):
            report = save_checkpoint(
                path,
                slice_map=trained.slice_map,
                rank=trained.parallel.rank,
                parameters=trained.parameters(),
                adam=trained.adam(),
                param_group=trained.adam_options(),
                metadata=metadata,
                tied=trained.tied,
                control_group=trained.parallel.control_group,
            )
        self.newest, self._postponed = path, False
        if report is not None:
            share = report.seconds / max(time.monotonic() - self._since, report.seconds)
            self._since = time.monotonic()
            self._report.checkpoint_saved(step, path, bytes=report.size, seconds=report.seconds, share=share)
            self._control.record(checkpoint=str(path), step=step)
            self._verifier.start(path)
        return path

    def close(self, save_again: Callable[[], object]) -> None:
        """Wait until the last checkpoint has been verified; where it is damaged, ``save_again``.

        Collective. Raises CheckpointError on all ranks where the disk spoils that one too.
        """
        problem = self._wait()
        if problem is None:
            return
        self._report.warn(f"{problem}; earlier checkpoints were kept, and it is written again")
        save_again()
        problem = self._wait()
        if problem is not None:
            self._tell_verified()
            raise problem

    def sound_checkpoint(self, resumed_from: Path | None) -> Path | None:
        """The newest checkpoint that has been verified, or else the one resumed from; collective.

        The verification under way is waited for.
        """
        if self._wait() is not None:
            self._tell_verified()
            if self.newest is not None:
                self._spoiled.append(self.newest)
            self._report.warn("the last checkpoint is spoiled; earlier checkpoints were kept")
            self._postponed = True
        found: Path | None = broadcast_object(self._verified or resumed_from, self._trained.parallel)
        return found

    def _wait(self) -> CheckpointError | None:
        with self._control.phase("save"):
            problem: CheckpointError | None = broadcast_object(self._verifier.wait(), self._trained.parallel)
        return problem

    def _tell_verified(self) -> None:
        """The status no longer names a checkpoint that did not verify."""
        self._control.record(checkpoint=str(self._verified) if self._verified else None)

    def _prune(self, verified: Path) -> None:
        self._verified = verified
        self._spoiled_in_a_row = 0
        prune(
            self._folder,
            newest_verified=verified,
            keep=self._options.keep_checkpoints,
            keep_every=self._options.keep_every,
            keep_steps=self._lasting,
            spoiled=self._spoiled,
        )
