"""Steps read one step late: the same records, decisions and weights; and nothing in a step waits."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import argonne.tp.layers
import argonne.tp.loss
from argonne.config.run_options import CheckpointOptions
from argonne.errors import NonFiniteError
from argonne.training.ledger import StepLedger
from argonne.training.state import Run
from argonne.training.step import TrainingStep, Votes
from data_stream import StepBatch
from tests.training.small_run import batch_of, trained_model, training_options
from tests.training.test_state import small_run


class ValuesAskedFor(TorchDispatchMode):
    """Counts the ops by which a host asks a tensor for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Totals late, and no check that reads values."""
    monkeypatch.setattr(TrainingStep, "reads_late", property(lambda step: not step.decides_on_host))
    for module in (argonne.tp.layers, argonne.tp.loss):
        monkeypatch.setattr(module, "can_be_read", lambda tensor: False)
    yield


def test_a_step_asks_for_no_value(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, norm, clipping, the decision to skip and AdamW; `tolist` is for its end."""
    listed: list[torch.Size] = []
    tolist = Tensor.tolist

    def noted(tensor: Tensor) -> Any:
        listed.append(tensor.shape)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", noted)
    step = TrainingStep(trained_model(grad_clip=0.5), training_options(grad_clip=0.5), accumulation=2)
    with ValuesAskedFor() as asked:
        started = step.start(batch_of(4), 0, votes=Votes(busy=True))
        assert asked.count == 0 and listed == []
    result = step.finish(started)
    assert listed == [torch.Size([6])] and result.votes == Votes(busy=True) and not result.skipped


def test_the_counter_sees_a_value_asked_for() -> None:
    with ValuesAskedFor() as asked:
        assert bool(torch.ones(2).any()) and torch.ones(1).item() == 1.0
    assert asked.count == 2


def taken(folder: Path, batches: list[StepBatch], votes: dict[int, Votes], broken: set[int]) -> Run:
    """A run over the batches; in the steps of ``broken`` a gradient is not finite."""
    run = small_run(folder, checkpoint=CheckpointOptions(checkpoint_interval=5, keep_checkpoints=2))
    run.restore(None)
    steps = StepLedger(run)
    weight = run.trained.model.norm.weight
    weight.register_hook(lambda grad: grad * math.nan if run.step + 1 in broken else grad)
    try:
        for batch in batches:
            found = steps.take(batch, votes.get(run.step + 1, Votes()), since=0.0)
            assert found is not None
            if found.stop:
                break
        steps.settle()
    finally:
        run.report.close()
    return run


def recorded(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "stats" / "training_metrics.jsonl").read_text()
    clocks = ("step_seconds", "tokens_per_second", "peak_memory_bytes", "mfu", "time")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in text.splitlines()]


def test_late_steps_leave_the_same_records_and_weights(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    batches = [batch_of(2, seed=number) for number in range(8)]
    at_once = taken(tmp_path / "once", batches, {}, broken={3, 4})
    request.getfixturevalue("as_on_a_gpu")
    late = taken(tmp_path / "late", batches, {}, broken={3, 4})
    assert recorded(tmp_path / "late") == recorded(tmp_path / "once")
    lines = recorded(tmp_path / "late")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "skipped" in line] == [3, 4]
    for name, weight in at_once.trained.parameters().items():
        assert torch.equal(weight, late.trained.parameters()[name]), name
    for name, state in at_once.trained.adam().items():
        assert all(torch.equal(value, late.trained.adam()[name][key]) for key, value in state.items()), name
        assert state["step"] == 6


def test_a_wish_to_stop_is_seen_one_step_later_and_that_step_is_complete(
    tmp_path: Path, as_on_a_gpu: None
) -> None:
    batches = [batch_of(2, seed=number) for number in range(8)]
    run = taken(tmp_path, batches, {2: Votes(stop=True)}, broken=set())
    assert run.step == 3 and [line["step"] for line in recorded(tmp_path)] == [1, 2, 3]


def test_the_step_before_a_checkpoint_is_read_at_once(tmp_path: Path, as_on_a_gpu: None) -> None:
    run = small_run(tmp_path, checkpoint=CheckpointOptions(checkpoint_interval=2, keep_checkpoints=2))
    run.restore(None)
    steps = StepLedger(run)
    written = []
    for number in range(5):
        steps.take(batch_of(2, seed=number), Votes(), since=0.0)
        written.append(len(recorded(tmp_path)))
    assert written == [0, 2, 2, 4, 4]
    run.report.close()


def test_too_many_skipped_steps_end_a_late_run_too(tmp_path: Path, as_on_a_gpu: None) -> None:
    batches = [batch_of(2, seed=number) for number in range(14)]
    with pytest.raises(NonFiniteError, match="up to step 10 "):
        taken(tmp_path, batches, {}, broken=set(range(1, 15)))


def test_what_the_host_must_decide_is_read_at_once(as_on_a_gpu: None) -> None:
    trained = trained_model()
    assert TrainingStep(trained, training_options(), 1).reads_late
    assert not TrainingStep(trained, training_options(), 1, lambda totals: None).reads_late
    trained.dtype = torch.float16
    assert not TrainingStep(trained, training_options(), 1).reads_late
