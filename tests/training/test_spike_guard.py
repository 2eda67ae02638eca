"""The guard around the spike rule: what it judges, how often it lets a run go back, what it records."""

import json
from pathlib import Path
from typing import Any

import pytest

from argonne.files import OutputFolder
from argonne.training import spikes
from argonne.training.optimizer import StepTotals
from argonne.training.rewind import rewind_if_asked
from argonne.training.spike_guard import MOST_REWINDS, SPIKES_KEY, SpikeGuard
from argonne.training.spikes import Spike
from argonne.training.step import TrainingStep, Votes
from tests.run.test_report import begun
from tests.training.small_run import batch_of, trained_model, training_options
from tests.training.test_state import small_run

SPIKE = Spike(quantity="loss", value=9.0, threshold=4.0)


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "LEAST", 5)


def judged(guard: SpikeGuard, *losses: float) -> list[bool]:
    return [guard.judge(StepTotals(grad_norm=1.0, loss=loss)) is not None for loss in losses]


def test_nothing_is_judged_without_an_action() -> None:
    guard = SpikeGuard("none")
    assert guard.judge_of_steps is None and guard.metadata() == {}
    assert SpikeGuard("skip").judge_of_steps is not None


def test_a_resume_judges_alike_and_a_stage_begins_anew() -> None:
    guard, again = SpikeGuard("skip"), SpikeGuard("skip")
    assert judged(guard, *[2.0] * 5, 90.0) == [False] * 5 + [True]
    again.load_state_dict(json.loads(json.dumps(guard.metadata()[SPIKES_KEY])))
    assert judged(again, 90.0, 2.0) == judged(guard, 90.0, 2.0) == [True, False]
    guard.begin_stage()
    assert judged(guard, 90.0) == [False]


def test_ways_back_to_one_checkpoint_are_few(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    report, guard, path = begun(tmp_path), SpikeGuard("rewind"), tmp_path / "a.pth"
    for number in range(MOST_REWINDS):
        assert guard.may_go_back_to(path)
        places: dict[str, Any] = {
            "data_from": {"row": 0},
            "before": {"row": number},
            "after": {"row": number + 1},
            "place": {"row": number + 1},
            "passed_over": number + 3,
        }
        guard.rewound(SPIKE, 9, checkpoint=path, back_to=6, report=report, **places)
    assert not guard.may_go_back_to(path) and guard.may_go_back_to(tmp_path / "b.pth")
    note = guard.take_note()
    assert note["spike"]["back_to_step"] == 6 and guard.take_note() == {}
    told = {"from_step": 9, "to_step": 6, "passed_over": 5, "data_position": {"row": 3}}
    assert note["rewound"] == told
    report.close()
    lines = [json.loads(line) for line in OutputFolder(tmp_path).spikes.read_text().splitlines()]
    assert [(line["data_from"]["row"], line["data_after"]["row"]) for line in lines] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


def test_a_spike_leaves_weights_and_adam_alone() -> None:
    trained = trained_model()
    step = TrainingStep(trained, training_options(), 1, lambda totals: SPIKE)
    before = {name: tensor.clone() for name, tensor in trained.parameters().items()}
    result = step.run(batch_of(2), 0, votes=Votes())
    assert result.spike == SPIKE and not result.skipped
    assert all(tensor.equal(before[name]) for name, tensor in trained.parameters().items())
    assert all(not state["exp_avg"].any() for state in trained.adam().values())


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run.spikes.action = "rewind"
    step = TrainingStep(run.trained, training_options(), 1, lambda totals: SPIKE)
    batch = batch_of(2)
    assert not rewind_if_asked(run, batch, step.run(batch, 0, votes=Votes()))
    run.report.close()
