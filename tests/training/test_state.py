"""The state of a run between steps: restored, advanced, recorded, saved."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argonne.config.options import ParallelOptions
from argonne.data.excluded import Exclusion
from argonne.errors import NonFiniteError
from argonne.training.between_steps import check_replicas_if_due
from argonne.training.keeper import CheckpointKeeper
from argonne.training.optimizer import StepTotals
from argonne.training.run_data import RunData
from argonne.training.state import Run, peak_memory_bytes, reserved_memory
from argonne.training.step import StepResult, TrainingStep, Votes
from checkpointing import open_chosen
from tests.training.small_run import (
    BLOCK,
    SETTINGS,
    batch_of,
    control_and_report,
    run_config,
    single_stage,
    trained_model,
    training_options,
)


class Source:
    """Rank 0's data, as far as the run asks it: a place is a number."""

    def __init__(self, start: Any) -> None:
        self.start = start
        self.exclusion = Exclusion()

    def position_dict(self, progress: Any) -> dict[str, Any]:
        return {"row": progress.row}

    def state_dict(self, progress: Any) -> dict[str, Any]:
        return {"rows": progress.row, "samples": progress.samples}


def progress_at(row: int, skipped: tuple[Any, ...] = ()) -> Any:
    metrics = {"data_rows": row, "data_position": {"row": row}}
    return SimpleNamespace(row=row, samples=row, skipped=skipped, metrics=lambda: metrics)


def small_run(folder: Path, **groups: Any) -> Run:
    config = run_config(folder, **groups)
    control, report = control_and_report(folder)
    trained = trained_model()
    report.begin(first_step=0, total_steps=config.training.total_steps)
    return Run(
        stages=single_stage(config),
        settings=dict(SETTINGS),
        trained=trained,
        one_step=TrainingStep(trained, config.training, 1),
        feed=None,  # type: ignore[arg-type]
        data=RunData(opened=Source(progress_at(0)), report=report),  # type: ignore[arg-type]
        tokenizer=None,
        keeper=CheckpointKeeper(trained, config, control, report),
        control=control,
        report=report,
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = small_run(tmp_path)
    yield made
    made.report.close()


def result_of(loss: float = 2.5, *, skipped: bool = False, too_many: bool = False) -> StepResult:
    totals = StepTotals(grad_norm=0.5, loss=loss)
    return StepResult(totals=totals, votes=Votes(), lr=1e-3, skipped=skipped, too_many_skipped=too_many)


def advance(
    run: Run, row: int, result: StepResult, skipped: tuple[Any, ...] = (), sources: Any = None
) -> None:
    batch: Any = SimpleNamespace(progress=progress_at(row, skipped), wait_seconds=0.25, sources=sources)
    run.complete(batch, result, 1.5)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "stats" / "training_metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_step_is_counted_and_recorded(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.restore(None)
    advance(run, 3, result_of())
    advance(run, 5, result_of(2.0))
    assert (run.step, run.tokens_processed, run.loss) == (2, 2 * 2 * BLOCK, 2.0)
    assert run.control.progress.step == 2
    first, second = lines(tmp_path)
    assert (first["step"], first["loss"], first["lr"], first["grad_norm"]) == (1, 2.5, 1e-3, 0.5)
    assert (second["tokens_processed"], second["data_rows"]) == (64, 5)
    assert "Position: 5 |" in capsys.readouterr().out
    assert (second["step_seconds"], second["data_wait_seconds"]) == (1.5, 0.25)


def test_the_loss_of_each_source_that_the_step_has(run: Run) -> None:
    run.data.opened.source_names = ("web", "code", "books")  # type: ignore[union-attr, misc]
    totals = StepTotals(grad_norm=0.5, loss=2.5, source_losses=(3.0 * BLOCK, 0.0, 10.0 * BLOCK))
    result = StepResult(totals=totals, votes=Votes(), lr=1e-3, skipped=False, too_many_skipped=False)
    advance(run, 4, result, sources=torch.tensor([2, 0, 2, 2, 2]))
    path = Path(run.config.output.output_dir) / "stats" / "training_metrics.jsonl"
    assert json.loads(path.read_text())["loss_by_source"] == {"web": 3.0, "books": 2.5}


def test_a_skipped_step_is_recorded_and_too_many_end_the_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advance(run, 1, result_of(math.nan, skipped=True))
    assert "a step was skipped: loss or gradient is not finite" in capsys.readouterr().err
    assert lines(tmp_path)[0]["skipped"] == "non-finite loss or gradient"
    with pytest.raises(NonFiniteError, match="in too many steps in a row, up to step 2 "):
        advance(run, 1, result_of(math.inf, skipped=True, too_many=True))
    assert len(lines(tmp_path)) == 2  # the last one too


def test_what_is_newly_skipped_is_said_once(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skip = {"rows": 4, "row": 8, "file_name": "a.parquet", "reason": "damaged"}
    run.restore(None)
    advance(run, 3, result_of(), (skip,))
    advance(run, 5, result_of(), (skip,))
    assert capsys.readouterr().err.count("4 rows from row 8 on of a.parquet: damaged") == 1
    assert [line.get("data_skipped") for line in lines(tmp_path)] == [[skip], None]


def test_a_saved_run_is_restored(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.restore(None)
    result = run.one_step.run(batch_of(2), 0, votes=Votes())
    advance(run, 3, result)
    path = run.save()
    run.keeper.close(lambda: None)
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 1 and saved["scheduler_state_dict"] == {"step": 0}
    assert (saved["tokens_processed"], saved["loss"]) == (32, result.totals.loss)
    assert (saved["data_position"], saved["data_state"]) == ({"row": 3}, {"rows": 3, "samples": 3})
    assert (saved["global_batch_size"], saved["model_dtype"]) == (2, "torch.float32")
    assert saved["model_config"] == {"model_type": "argonne2", **SETTINGS}
    assert saved["optimizer_state_dict"]["state"][0]["step"].item() == 1.0

    view, _, _ = open_chosen(None, tmp_path, force_from_scratch=False, rank=0, control_group=None)
    again = small_run(
        tmp_path, training=training_options(weight_decay=0.2, learning_rate=0.5, min_learning_rate=0.25)
    )
    capsys.readouterr()
    again.restore(view)
    out, err = capsys.readouterr()
    assert "--weight-decay was 0.1, is 0.2" in out and "--learning-rate was 0.01, is 0.5" in out
    assert out.count("Changed since the checkpoint") == 3
    assert "warning: the learning rate jumps up from 0.001" in err
    assert (again.step, again.tokens_processed, again.loss) == (1, 32, run.loss)
    again.report.close()


def test_a_loss_that_is_not_finite_is_saved_as_none(run: Run) -> None:
    run.loss = math.nan
    assert run.checkpoint_metadata()["loss"] is None
    assert "data_position" not in run.checkpoint_metadata()  # no step yet: other ranks have no place either


def test_replicas_are_compared_at_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    for interval, expected in ((3, [3, 6]), (0, [])):
        made = small_run(tmp_path, parallel=ParallelOptions(replica_check_interval=interval))
        monkeypatch.setattr(
            "argonne.training.between_steps.check_replicas", lambda *_, made=made: compared.append(made.step)
        )
        compared.clear()
        for made.step in range(1, 8):
            check_replicas_if_due(made)
        assert compared == expected
        made.report.close()


def test_memory_of_this_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(40_000_000)
    assert before > 10**8 and peak_memory_bytes(torch.device("cpu")) >= before and held.numel()


def test_reserved_memory_is_a_figure_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert reserved_memory(torch.device("cuda", 0)) == {"peak_reserved_bytes": 7}
    assert reserved_memory(torch.device("cpu")) == {}
