"""Between steps: at which steps validation, samples and checks are due, and what they are asked for."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.run.evaluations import ValidationRecord
from argonne.training import between_steps
from argonne.training.between_steps import (
    begin_step,
    check_replicas_if_due,
    end_step,
    sample_if_due,
    validate_if_due,
    validate_if_missed,
)

LAST = 10


class Calls:
    """A run of ten steps that notes what was asked of it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.asked: list[Any] = []
        self.phases: list[str] = []
        note = self.asked.append
        output = SimpleNamespace(sample_interval=options.get("samples", 0), sample_prompt="Once")
        self.run: Any = SimpleNamespace(
            step=0,
            tokenizer="tokenizer",
            config=SimpleNamespace(
                evaluation=SimpleNamespace(eval_interval=options.get("validations", 0)),
                output=output,
                parallel=SimpleNamespace(replica_check_interval=options.get("checks", 0)),
                training=SimpleNamespace(seed=100),
            ),
            stages=SimpleNamespace(last_step=LAST, label=lambda: {"stage": "anneal"}),
            control=SimpleNamespace(phase=self.phase),
            trained=SimpleNamespace(
                parameters=lambda: "parameters", slice_map="map", parallel=SimpleNamespace(control_group=None)
            ),
            validation_sets=options.get("sets", ("web", "code")),
            report=SimpleNamespace(
                evaluations=None,
                info=note,
                validation=note,
                sample=lambda *args, **more: note((args, more)),
            ),
            profiler=SimpleNamespace(
                before_step=lambda step: note(("profile begins", step)),
                after_step=lambda step: f"profile of {step}" if step == 3 else None,
            ),
            garbage=SimpleNamespace(after_step=lambda step: note(("garbage", step))),
            audit=SimpleNamespace(
                begin_step=lambda run: note(("audit begins", run.step)),
                end_step=lambda run: note(("audit", run.step)),
            ),
        )
        monkeypatch.setattr(between_steps, "validate", lambda trained, name, step: record(name, step))
        monkeypatch.setattr(
            between_steps, "generate_text", lambda *_, prompt, seed: f"{prompt} with seed {seed}"
        )
        monkeypatch.setattr(between_steps, "check_replicas", lambda *what: note(("replicas", *what)))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        yield

    def steps_at_which(self, asks: Any) -> list[int]:
        """Of the steps 1 to 10."""
        found = []
        for step in range(1, LAST + 1):
            before = len(self.asked)
            self.run.step = step
            asks(self.run)
            found += [step] if len(self.asked) > before else []
        return found


def record(name: Any, step: int) -> ValidationRecord:
    return ValidationRecord(
        step=step, name=name, loss=1.0, samples=1, tokens=8, text_bytes=0, seconds=0.0, extra={}
    )


@pytest.mark.parametrize(("interval", "due"), [(0, [10]), (4, [4, 8, 10]), (5, [5, 10]), (11, [10])])
def test_validation_is_due_at_its_interval_and_at_the_end_once(
    interval: int, due: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, validations=interval)
    assert calls.steps_at_which(validate_if_due) == due
    assert [(entry.step, entry.name) for entry in calls.asked] == [
        (step, name) for step in due for name in ("web", "code")
    ]
    assert all(entry.extra == {"stage": "anneal"} for entry in calls.asked)
    assert calls.phases == ["validate"] * len(due)


def test_without_sets_there_is_no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, validations=1, sets=())
    assert calls.steps_at_which(validate_if_due) == [] and calls.phases == []


@pytest.mark.parametrize(
    ("step", "recorded", "made"),
    [
        (4, None, True),
        (4, 0, True),
        (4, 4, False),
        (5, 4, False),
        (0, 0, False),
        (LAST, 8, True),
    ],
)
def test_a_resume_makes_the_validation_that_its_run_was_stopped_before(
    step: int, recorded: int | None, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, validations=4)
    calls.run.step = step
    if recorded is not None:
        calls.run.report.evaluations = SimpleNamespace(last_step=recorded)
    validate_if_missed(calls.run)
    assert bool(calls.asked) == made


def test_a_sample_has_a_seed_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, samples=4)
    assert calls.steps_at_which(sample_if_due) == [4, 8]
    more = {"prompt": "Once", "extra": {"stage": "anneal"}}
    assert calls.asked == [((4, "Once with seed 104"), more), ((8, "Once with seed 108"), more)]
    assert calls.phases == ["sample", "sample"]
    assert Calls(monkeypatch).steps_at_which(sample_if_due) == []


def test_replicas_are_compared_at_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, checks=3)
    assert calls.steps_at_which(check_replicas_if_due) == [3, 6, 9]
    assert calls.asked[0][:3] == ("replicas", "parameters", "map")
    assert Calls(monkeypatch).steps_at_which(check_replicas_if_due) == []


def test_the_end_of_a_step_says_the_profile_then_collects_audits_and_compares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch, checks=3)
    for calls.run.step in (2, 3):
        end_step(calls.run)
    assert [entry if isinstance(entry, str) else entry[0] for entry in calls.asked] == [
        *("garbage", "audit", "profile of 3"),
        *("garbage", "audit", "replicas"),
    ]


def test_a_step_begins_with_its_profile_and_its_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    calls.run.step = 6
    begin_step(calls.run)
    assert calls.asked == [("profile begins", 7), ("audit begins", 6)]
