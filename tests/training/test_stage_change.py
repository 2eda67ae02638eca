"""From one stage to the next around the same model: data, schedule and context change, the rest stays."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.config.command_line import parse_recipe
from argonne.config.options import DataOptions
from argonne.errors import DataError
from argonne.training import stage_change
from argonne.training.data_places import data_source
from argonne.training.stage_change import begin_stage, choose_stage, enter_next_stage, raise_context
from argonne.training.stages import PlannedStage
from argonne.training.state import Run
from tests.training.small_run import BLOCK, SETTINGS, control_and_report, run_config, training_options
from tests.training.test_state import Source, progress_at, small_run

CONTEXT = SETTINGS["max_position_embeddings"]


class Feed:
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def close(self) -> None:
        self.events.append("feed closed")


def planned(folder: Path, name: str, *, reset: bool = False, glob: str = "a/*", **training: Any) -> Any:
    config = run_config(
        folder,
        training=training_options(**training),
        data=DataOptions(tokenizer_path="t", data_glob=(glob,)),
    )
    return PlannedStage(name=name, config=config, samples_per_step=2, accumulation=1, reset_optimizer=reset)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """At the end of the first of two stages; ``events`` of its feed are noted."""
    made = small_run(tmp_path)
    made.stages.planned = (
        planned(tmp_path, "pretrain", total_steps=4),
        planned(
            tmp_path, "long", reset=True, glob="b/*", total_steps=3, block_size=2 * CONTEXT, grad_clip=0.25
        ),
    )
    made.restore(None)
    made.step = 4
    made.feed = Feed([])  # type: ignore[assignment]
    for state in made.trained.adam().values():
        state["exp_avg"].fill_(0.25)

    def opened(*given: Any, new_stage: bool) -> Any:
        made.feed.events.append("opened")  # type: ignore[attr-defined]
        made.tokenizer = (given, new_stage)
        return Source(progress_at(0)), Feed([])

    monkeypatch.setattr(stage_change, "open_feed", opened)
    monkeypatch.setattr(stage_change, "validation_sets", lambda config, *_: (config.training.block_size,))
    yield made
    made.report.close()


def test_the_next_stage_has_its_own_data_batches_and_sets(run: Run) -> None:
    run.data.advance(progress_at(40))
    events, model, step = run.feed.events, run.trained, run.one_step  # type: ignore[attr-defined]
    assert enter_next_stage(run)
    assert events == ["feed closed", "feed closed", "opened"]
    (config, _, metadata, at, samples, _, _, vocabulary), new_stage = run.tokenizer
    assert (config, at, samples, vocabulary) == (run.stages.planned[1].config, 4, 2, 131) and new_stage
    assert metadata["data_position"] == {"row": 40} and metadata["data_source"]["key"] == "a/*"
    assert (run.stages.current.name, run.stages.first_step, run.stages.last_step) == ("long", 4, 7)
    assert run.data.position() == {"row": 0} and run.validation_sets == (2 * CONTEXT,)
    assert run.trained is model and run.one_step is not step
    assert run.data.places == {
        "a/*": {"data_position": {"row": 40}, "data_state": {"rows": 40, "samples": 40}}
    }


def test_the_loss_scale_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Step:
        def __init__(self, *_: Any) -> None:
            self.scaler = SimpleNamespace(load_state_dict=loaded.append)

    loaded: list[Any] = []
    monkeypatch.setattr(stage_change, "TrainingStep", Step)
    monkeypatch.setattr(run.one_step.scaler, "state_dict", lambda: {"scale": 512.0, "finite_steps": 3})
    assert enter_next_stage(run)
    assert loaded == [{"scale": 512.0, "finite_steps": 3}]


def test_after_the_last_stage_nothing_changes(run: Run) -> None:
    assert enter_next_stage(run)
    feed = run.feed
    assert not enter_next_stage(run)
    assert run.feed is feed and feed.events == []  # type: ignore[attr-defined]
    assert run.stages.current.name == "long"


def test_a_stage_that_begins_says_so_and_keeps_its_end(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(run.keeper, "keep_for_good", kept.append)
    assert enter_next_stage(run)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"Stage 2 of 2: long, steps 5 to 7, 2 sequences of {2 * CONTEXT} tokens a step"
    assert "The optimizer begins anew (reset-optimizer of stage long)" in said
    assert kept == [(4, 7)]
    assert all(not state["exp_avg"].any() for state in run.trained.adam().values())


def test_a_resume_within_a_stage_keeps_its_optimizer(run: Run) -> None:
    run.stages.advance()
    run.step = 5
    begin_stage(run, {})
    assert all((state["exp_avg"] == 0.25).all() for state in run.trained.adam().values())


def test_a_run_without_stages_says_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.stages.planned = (dataclasses.replace(run.stages.planned[0], name="", reset_optimizer=True),)
    run.step = 0
    begin_stage(run, {})
    assert capsys.readouterr().out == ""
    assert all((state["exp_avg"] == 0.25).all() for state in run.trained.adam().values())


def test_a_longer_stage_costs_more_a_token(run: Run) -> None:
    begin_stage(run, {})
    short = run.report.flops_per_token
    assert enter_next_stage(run)
    assert short is not None and run.report.flops_per_token is not None
    assert run.report.flops_per_token > short


@pytest.mark.parametrize(
    ("block", "context"), [(CONTEXT, CONTEXT), (CONTEXT + 1, CONTEXT + 1), (BLOCK, CONTEXT)]
)
def test_only_a_longer_block_raises_the_context(block: int, context: int) -> None:
    said: list[str] = []
    settings = dict(SETTINGS)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=CONTEXT))
    raise_context(settings, SimpleNamespace(model=model), block, said.append)  # type: ignore[arg-type]
    assert settings["max_position_embeddings"] == model.config.max_position_embeddings == context
    raised = [f"max_position_embeddings {CONTEXT} is raised to --block-size {block}"]
    assert said == (raised if block > CONTEXT else [])


def test_data_of_a_stage_ahead_that_is_not_there_is_said_now(tmp_path: Path) -> None:
    text = f"""
tokenizer-path = "t"
block-size = 8
batch-size = 2
warmup-steps = 0
output-dir = "{tmp_path}"
data-glob = "{tmp_path}/here.parquet"
[[stage]]
name = "first"
total-steps = 4
[[stage]]
name = "second"
total-steps = 4
data-glob = "{tmp_path}/missing/*.parquet"
"""
    (tmp_path / "recipe.toml").write_text(text)
    recipe = parse_recipe(["--config", str(tmp_path / "recipe.toml")])
    parallel: Any = SimpleNamespace(dp_size=1, rank=0, control_group=None)
    _, report = control_and_report(tmp_path)
    with pytest.raises(DataError, match=r"^stage second: .*missing/\*\.parquet") as caught:
        choose_stage(recipe, {}, 0, parallel, report)
    assert "\n" not in str(caught.value)
    # The data of the stage that the run stands in is opened by its feed, not here.
    last = dataclasses.replace(recipe, stages=recipe.stages[:1])
    stages = choose_stage(last, {}, 0, parallel, report)
    assert (stages.current.name, stages.end) == ("first", 4)
    assert data_source(stages.current.config)["key"] == f"{tmp_path}/here.parquet"
