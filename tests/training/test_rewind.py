"""The way back from a spike: weights, counters and optimizer of the checkpoint, data behind the spike."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.training.optimizer import StepTotals
from argonne.training.rewind import rewind_if_asked
from argonne.training.spike_guard import MOST_REWINDS
from argonne.training.spikes import Spike
from argonne.training.state import Run
from argonne.training.step import StepResult, Votes
from tests.training.test_state import advance, lines, progress_at, result_of, small_run

SPIKED = StepResult(
    totals=StepTotals(grad_norm=1.0, loss=90.0),
    votes=Votes(),
    lr=1e-3,
    skipped=False,
    too_many_skipped=False,
    spike=Spike(quantity="loss", value=90.0, threshold=4.0),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """After six steps, with a sound checkpoint of step 4 and weights and moments that have moved since."""
    made = small_run(tmp_path)
    made.spikes.action = "rewind"
    made.restore(None)
    for step in range(1, 5):
        advance(made, 10 * step, result_of(3.0 - step / 10))
    for state in made.trained.adam().values():
        state["exp_avg"].fill_(0.25)
    path = made.save()
    made.keeper.close(lambda: None)  # verified
    monkeypatch.setattr(made.keeper, "sound_checkpoint", lambda resumed_from: path)
    for step in (5, 6):
        advance(made, 10 * step, result_of(2.0))
    for tensor in made.trained.parameters().values():
        tensor.detach().add_(1.0)
    for state in made.trained.adam().values():
        state["exp_avg"].fill_(9.0)
    yield made
    made.report.close()


def batch(row: int) -> Any:
    return SimpleNamespace(progress=progress_at(row), wait_seconds=0.0, sources=None)


def test_weights_moments_and_counters_are_the_checkpoints_and_the_data_goes_on(
    run: Run, tmp_path: Path
) -> None:
    moved = {name: tensor.detach().clone() for name, tensor in run.trained.parameters().items()}
    tokens = run.tokens_processed
    assert rewind_if_asked(run, batch(70), SPIKED)
    assert (run.step, run.tokens_processed, round(run.loss, 6)) == (4, tokens * 4 // 6, 2.6)
    for name, tensor in run.trained.parameters().items():
        assert (moved[name] - tensor - 1.0).abs().max() < 1e-6, name
    assert all((state["exp_avg"] == 0.25).all() for state in run.trained.adam().values())
    assert run.data.position() == {"row": 70}  # behind the batch that was a spike
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert run.control.progress.step == 4


def test_the_record_names_the_spike_and_the_data_passed_over(run: Run, tmp_path: Path) -> None:
    assert rewind_if_asked(run, batch(70), SPIKED)
    run.report.close()
    (path,) = (tmp_path / "stats").glob("*spike*")
    (record,) = (json.loads(line) for line in path.read_text().splitlines())
    assert (record["step"], record["back_to_step"], record["value"]) == (7, 4, 90.0)
    assert (record["data_from"]["row"], record["data_before"], record["data_after"]) == (
        40,
        {"row": 60},
        {"row": 70},
    )


def test_the_first_step_after_it_says_where_its_data_began(run: Run, tmp_path: Path) -> None:
    assert rewind_if_asked(run, batch(70), SPIKED)
    assert rewind_if_asked(run, batch(80), SPIKED)  # at once again
    run.complete(batch(82), SPIKED, 1.0)  # and a skipped one
    line = lines(tmp_path)[-1]
    assert line["skipped"] == "spike" and "back_to_step" not in line["spike"]
    assert line["rewound"] == {
        "from_step": 5,
        "to_step": 4,
        "passed_over": 20,  # samples 40 to 80, two a step
        "data_position": {"row": 80},
    }


@pytest.mark.parametrize("action", ["none", "skip"])
def test_no_other_action_goes_back(action: str, run: Run) -> None:
    run.spikes.action = action
    assert not rewind_if_asked(run, batch(70), SPIKED)
    assert (run.step, run.data.position()) == (6, {"row": 60})


def test_a_sound_step_stands(run: Run) -> None:
    assert not rewind_if_asked(run, batch(70), result_of())
    assert run.step == 6


def test_one_checkpoint_is_gone_back_to_a_few_times_only(run: Run) -> None:
    for row in range(70, 70 + MOST_REWINDS):
        assert rewind_if_asked(run, batch(row), SPIKED)
    assert not rewind_if_asked(run, batch(90), SPIKED)
    assert run.data.position() == {"row": 69 + MOST_REWINDS}


def test_a_checkpoint_of_an_earlier_stage_is_no_way_back(run: Run) -> None:
    run.stages.starts[:] = [5]
    assert not rewind_if_asked(run, batch(70), SPIKED) and run.step == 6


def test_a_checkpoint_that_cannot_be_read_closes_the_way(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved,) = (tmp_path / "pretrained").glob("*.pth")
    saved.write_bytes(b"no checkpoint")
    assert not rewind_if_asked(run, batch(70), SPIKED)
    assert run.step == 6
    told = capsys.readouterr().err
    assert "warning: cannot rewind after a spike, so the step is skipped: " in told
    assert saved.name in told


def test_a_stage_that_began_with_a_new_optimizer_gets_a_new_one_again(run: Run) -> None:
    run.stages.starts[:] = [4]
    stage = run.stages.current
    run.stages.planned = (SimpleNamespace(**{**vars(stage), "reset_optimizer": True}),)  # type: ignore[assignment]
    assert rewind_if_asked(run, batch(70), SPIKED)
    assert all(not state["exp_avg"].any() for state in run.trained.adam().values())


def test_of_a_checkpoint_without_moments_none_of_the_spikes_are_left(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.training.rewind.fill_weights", lambda *_: None)
    assert rewind_if_asked(run, batch(70), SPIKED)
    assert all(not state["exp_avg"].any() for state in run.trained.adam().values())
