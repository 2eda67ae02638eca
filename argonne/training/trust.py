"""When to trust what was saved: read it back in the background, then prune its predecessors (rank 0)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from argonne.config.run_options import CheckpointOptions
from argonne.errors import CheckpointError
from argonne.run.control import RunControl
from argonne.run.report import RunReport
from checkpointing import BackgroundVerifier, prune

_TRIES_AGAIN = 2
"""Spoiled checkpoints in a row that are saved again at once; a failing disk must not save at every step."""


class Trust:
    """Verifies checkpoints one after the other; knows the newest that is sound and those that are not."""

    def __init__(
        self, options: CheckpointOptions, folder: Path, control: RunControl, report: RunReport
    ) -> None:
        self._options = options
        self._folder = folder
        self._control = control
        self._report = report
        self._verifier = BackgroundVerifier(self._prune)
        self._verifying: Path | None = None
        self._next: Path | None = None
        self._spoiled: list[Path] = []
        self._spoiled_in_a_row = 0
        self.lasting: Sequence[int] = ()
        """Steps whose checkpoints are never pruned."""
        self.verified: Path | None = None
        """The newest that has been read back whole."""

    @property
    def busy(self) -> bool:
        """A checkpoint is being verified or waits for it."""
        return self._verifier.busy or self._next is not None

    def verify(self, path: Path) -> None:
        """Begin to read ``path`` back, or, while its predecessor is still being read, when that is done."""
        self._next = path
        self.go_on()

    def go_on(self) -> None:
        """Begin with the checkpoint that waits, where none is being verified."""
        if self._next is not None and not self._verifier.busy:
            self._verifying, self._next = self._next, None
            self._verifier.start(self._verifying)

    def spoiled(self) -> bool:
        """Whether the last checkpoint was found spoiled and another is wanted at once; warns when it does."""
        problem = self._verifier.poll()
        if problem is None:
            return False
        self.note_spoiled()
        self._spoiled_in_a_row += 1
        again = self._spoiled_in_a_row <= _TRIES_AGAIN
        then = "another is saved at once" if again else "the next is saved when due: check this disk"
        self._report.warn(f"{problem}; earlier checkpoints were kept, and {then}")
        return again

    def wait(self) -> CheckpointError | None:
        """Wait until all are verified; what is wrong with the last one."""
        problem = self._verifier.wait()
        if self._next is not None:
            if problem is not None:
                self.note_spoiled()
                self._report.warn(f"{problem}; earlier checkpoints were kept")
            self.go_on()
            problem = self._verifier.wait()
        return problem

    def note_spoiled(self) -> None:
        """The checkpoint verified last is not to be relied on: it goes when a later one is sound."""
        self.tell()
        if self._verifying is not None:
            self._spoiled.append(self._verifying)

    def tell(self) -> None:
        """The status no longer names a checkpoint that did not verify."""
        self._control.record(checkpoint=str(self.verified) if self.verified else None)

    def _prune(self, verified: Path) -> None:
        self.verified = verified
        self._spoiled_in_a_row = 0
        prune(
            self._folder,
            newest_verified=verified,
            keep=self._options.keep_checkpoints,
            keep_every=self._options.keep_every,
            keep_steps=self.lasting,
            spoiled=self._spoiled,
        )
