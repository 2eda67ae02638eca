"""Rewind after a spike: weights and optimizer of the last sound checkpoint, data behind the spike."""

from __future__ import annotations

from pathlib import Path

from argonne.errors import CheckpointError
from argonne.training.build import fill_weights
from argonne.training.optimizer import reset_adam
from argonne.training.state import Run
from argonne.training.step import StepResult
from checkpointing import CheckpointView, open_chosen
from data_stream import StepBatch


def rewind_if_asked(run: Run, batch: StepBatch, result: StepResult) -> bool:
    """Go back where the step was a spike and --spike-action says so; collective, all ranks alike.

    False where the step stands, be it as a skipped one because there is no way back: no checkpoint of this
    stage, one that cannot be read, or one that was gone back to too often.
    """
    if result.spike is None or run.spikes.action != "rewind":
        return False
    path = run.keeper.sound_checkpoint(run.resumed_from)
    view = _open(run, path) if path is not None and run.spikes.may_go_back_to(path) else None
    if path is None or view is None:
        return False
    _load(run, view)
    spiked, before = run.step + 1, run.data.position()
    run.data.advance(batch.progress)
    run.step = view.step
    run.tokens_processed = int(view.metadata.get("tokens_processed") or 0)
    run.loss = float(view.metadata.get("loss") or 0.0)
    run.one_step.scaler.load_state_dict(view.metadata.get("loss_scaler") or {})
    run.report.rewind(run.step)
    run.spikes.rewound(
        result.spike,
        spiked,
        checkpoint=path,
        back_to=run.step,
        data_from=view.saved_position or {},
        before=before,
        after=run.data.position(),
        report=run.report,
        place=run.data.place(),
        passed_over=_passed_over(run, view),
    )
    run.control.boundary(run.step)
    return True


def _open(run: Run, path: Path) -> CheckpointView | None:
    world = run.trained.parallel
    try:
        view, _, _ = open_chosen(
            str(path),
            Path(run.config.output.output_dir),
            force_from_scratch=False,
            rank=world.rank,
            control_group=world.control_group,
        )
    except CheckpointError as error:  # the same on all ranks
        run.report.warn(f"cannot rewind after a spike, so the step is skipped: {error}")
        return None
    return view if view is not None and view.step >= run.stages.first_step else None


def _passed_over(run: Run, view: CheckpointView) -> int:
    """Batches between the checkpoint's place in the data and today's; 0 on ranks without the data."""
    progress, opened = run.data.progress, run.data.opened
    if progress is None or opened is None:
        return 0
    saved = view.metadata.get("data_state") or {}
    begun = view.step == run.stages.first_step  # the checkpoint may be that of another stage's data
    before = opened.start.samples if begun or "samples" not in saved else int(saved["samples"])
    return (progress.samples - before) // run.samples_per_step


def _load(run: Run, view: CheckpointView) -> None:
    with run.control.phase("load"):
        reset_adam(run.trained.optimizer)
        fill_weights(run.trained, view, run.config.training.seed)
        if view.step == run.stages.first_step and run.stages.current.reset_optimizer:
            reset_adam(run.trained.optimizer)
