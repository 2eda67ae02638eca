"""What a resume says that it changes: settings of ours, of older and of pipeline files, and the rate."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.checkpoint.parts import open_any
from argonne.checkpoint.view import view_of
from argonne.config.distillation import DistillationOptions
from argonne.training.changes import changed_settings, rate_jump, run_settings, saved_settings
from argonne.training.schedule import Schedule
from checkpointing import CheckpointView
from tests import FIXTURES
from tests.training.small_run import training_options

CHANGES: dict[str, tuple[Any, str]] = {
    "learning_rate": (2e-2, "--learning-rate was 0.01, is 0.02"),
    "min_learning_rate": (0.0, "--min-learning-rate was 0.001, is 0"),
    "lr_schedule": ("linear", "--lr-schedule was cosine, is linear"),
    "warmup_steps": (3, "--warmup-steps was 2, is 3"),
    "total_steps": (20, "--total-steps was 10, is 20"),
    "weight_decay": (0.2, "--weight-decay was 0.1, is 0.2"),
    "adam_betas": ((0.9, 0.95), "--adam-betas was 0.9 0.999, is 0.9 0.95"),
    "grad_clip": (0.5, "--grad-clip was 1, is 0.5"),
    "seed": (6, "--seed was 5, is 6"),
    "block_size": (32, "--block-size was 16, is 32"),
}


def settings(samples: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    return run_settings(training_options(**changes), DistillationOptions(), dtype, samples)


def view(group: dict[str, Any] | None = None, **metadata: Any) -> CheckpointView:
    return CheckpointView(
        path=Path("c.pth"),
        kind="pipeline",
        metadata=metadata,
        tied=True,
        shapes={},
        names=(),
        adam_steps={},
        adam_note="",
        param_groups=(group,) if group else (),
        size=0,
        identity="",
    )


@pytest.mark.parametrize("key", CHANGES)
def test_each_setting_is_one_line_with_both_values(key: str) -> None:
    value, text = CHANGES[key]
    old = saved_settings(view(run_settings=settings()))
    assert changed_settings(old, settings(**{key: value})) == [f"Changed since the checkpoint: {text}"]


def test_the_rest_of_the_settings() -> None:
    old = saved_settings(view(run_settings=settings()))
    assert changed_settings(old, settings()) == []
    lines = changed_settings(old, settings(samples=4, dtype=torch.bfloat16))
    assert [line.partition(": ")[2] for line in lines] == [
        "--dtype was float32, is bfloat16",
        "--global-batch-size was 2, is 4",
    ]
    cooled = settings(lr_schedule="wsd", cooldown_steps=3)
    assert len(changed_settings(old, cooled)) == 2  # the schedule and its cooldown


def test_a_changed_kind_of_replicas_is_said_where_there_were_and_are_several() -> None:
    def kept(replicas: str | None) -> dict[str, Any]:
        return run_settings(training_options(), DistillationOptions(), torch.float32, 2, replicas=replicas)

    for old, new in itertools.permutations(("ddp", "fsdp", "hsdp", None), 2):
        lines = changed_settings(saved_settings(view(run_settings=kept(old))), kept(new))
        several = old is not None and new is not None
        assert lines == (
            [f"Changed since the checkpoint: --data-parallel was {old}, is {new}"] if several else []
        )


def test_an_older_checkpoint_is_compared_as_far_as_it_tells() -> None:
    group = {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.3}
    older = view(group, seed=9, global_batch_size=8, model_dtype="torch.float32")
    assert [line.partition(": ")[2] for line in changed_settings(saved_settings(older), settings())] == [
        "--weight-decay was 0.3, is 0.1",
        "--adam-betas was 0.8 0.95, is 0.9 0.999",
        "--seed was 9, is 5",
        "--global-batch-size was 8, is 2",
    ]
    with_data = view(global_batch_size=8, data_state={"samples_per_step": 8, "block_size": 4})
    assert saved_settings(with_data) == {}  # the data names its own differences
    assert saved_settings(view()) == {}


def test_what_the_files_of_other_trainers_tell() -> None:
    family = saved_settings(view_of(open_any(FIXTURES / "family_checkpoint_step_20.pt")))
    assert family == {"learning_rate": 0.003, "weight_decay": 0.1, "adam_betas": [0.9, 0.95]}
    pipeline = saved_settings(view_of(open_any(FIXTURES / "streaming_checkpoint_step_25.pth")))
    assert pipeline == {"weight_decay": 0.1, "adam_betas": [0.9, 0.999], "dtype": "torch.bfloat16"}


def schedule(**changes: Any) -> Schedule:
    return Schedule.of(training_options(**changes))


def test_a_finished_run_that_is_extended_jumps_up() -> None:
    finished = view({"lr": schedule().rate(9)}, global_step=10)
    assert rate_jump(finished, schedule()) is None  # nothing is left to train
    line = rate_jump(finished, schedule(total_steps=20))
    assert line is not None and line.startswith("the learning rate jumps up from 0.00134 in the checkpoint")
    assert "to 0.00628 in the next" in line and "over 20 steps" in line
    drop = rate_jump(finished, schedule(total_steps=20, learning_rate=1e-3, min_learning_rate=1e-4))
    assert drop is not None and drop.startswith("the learning rate drops from 0.00134")


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_a_rate_that_goes_on_is_no_jump(kind: str) -> None:
    same = schedule(lr_schedule=kind, cooldown_steps=4 if kind == "wsd" else None)
    for step in range(10):
        counted_alike = view({"lr": same.rate(max(0, step - 1))}, global_step=step)
        counted_ahead = view({"lr": same.rate(step)}, global_step=step)
        assert rate_jump(counted_alike, same) is None and rate_jump(counted_ahead, same) is None
    assert rate_jump(view(global_step=5), same) is None  # it does not say its rate
