"""Save at intervals, read back in the background, prune what has a verified successor."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpointing import BackgroundVerifier, checkpoint_path, prune, save_checkpoint
from run_config import CheckpointOptions
from run_control import RunControl
from run_report import RunReport
from training_build import TrainedModel


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
        self._folder = output_dir / "pretrained"
        self._control = control
        self._report = report
        self._verifier = BackgroundVerifier(self._prune)
        self.newest: Path | None = None
        """The newest checkpoint that this run wrote."""
        self._postponed = False

    @property
    def busy(self) -> bool:
        """Rank 0 still reads its last checkpoint back."""
        return self._verifier.busy

    def due(self, step: int, *, busy: bool) -> bool:
        """Whether to save after ``step`` steps; a save that falls due while the last is read back waits."""
        due = step % self._options.checkpoint_interval == 0 or self._postponed
        if due and busy:
            if not self._postponed:
                self._report.warn(
                    f"the checkpoint due at step {step} waits until the last one has been read back: "
                    "--checkpoint-interval is short for this disk"
                )
            self._postponed = True
            return False
        return due

    def save(self, step: int, metadata: Mapping[str, Any]) -> Path:
        """Write the checkpoint after ``step`` steps; collective. Raises CheckpointError on all ranks."""
        trained = self._trained
        path = checkpoint_path(self._folder, step)
        self._complain()
        with self._control.phase("save"):
            report = save_checkpoint(
                path,
                slice_map=trained.slice_map,
                rank=trained.parallel.rank,
                parameters=trained.parameters(),
                adam=trained.adam(),
                param_group=_options_of(trained),
                metadata=metadata,
                tied=trained.tied,
                control_group=trained.parallel.control_group,
            )
        self.newest, self._postponed = path, False
        if report is not None:
            self._report.checkpoint_saved(step, path, bytes=report.size, seconds=report.seconds)
            if self._control.status is not None:
                self._control.status.update(checkpoint=str(path), step=step)
            self._verifier.start(path)
        return path

    def close(self) -> None:
        """Wait until the last checkpoint has been read back."""
        problem = self._verifier.wait()
        if problem is not None:
            self._report.warn(f"{problem}; earlier checkpoints were kept")

    def _complain(self) -> None:
        problem = self._verifier.poll()
        if problem is not None:
            self._report.warn(f"{problem}; earlier checkpoints were kept")

    def _prune(self, verified: Path) -> None:
        prune(
            self._folder,
            newest_verified=verified,
            keep=self._options.keep_checkpoints,
            keep_every=self._options.keep_every,
        )


def _options_of(trained: TrainedModel) -> dict[str, Any]:
    group = trained.optimizer.param_groups[0]
    return {key: value for key, value in group.items() if key != "params"}


def checkpoint_metadata(
    *,
    step: int,
    tokens_processed: int,
    loss: float,
    trained: TrainedModel,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    scaler: Mapping[str, Any],
    global_batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """The keys of a checkpoint beside weights and optimizer; ``data`` holds its position and state."""
    return {
        "global_step": step,
        "tokens_processed": tokens_processed,
        "scheduler_state_dict": {"step": step - 1},
        "loss": loss if math.isfinite(loss) else None,
        "model_dtype": str(trained.dtype),
        "model_config": {"model_type": "argonne2", **settings},
        "loss_scaler": dict(scaler),
        "global_batch_size": global_batch_size,
        "seed": seed,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **data,
    }
