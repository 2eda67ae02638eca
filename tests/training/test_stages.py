"""Where a run stands in its recipe: steps, places, and what of a recipe may change between submissions."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from argonne.config.command_line import parse_recipe
from argonne.config.mixture import MixedSource
from argonne.config.options import DataOptions
from argonne.config.recipe import Recipe
from argonne.errors import CheckpointError, ConfigError
from argonne.training.data_places import data_source, metadata_for, places_beside
from argonne.training.stages import Stages, plan_stages, resume_stages

RECIPE = """
tokenizer-path = "t"
block-size = 8
batch-size = 2
warmup-steps = 0

[[stage]]
name = "first"
total-steps = 4

[[stage]]
name = "second"
total-tokens = 100
data-glob = "other/*.parquet"
learning-rate = 1e-3
block-size = 16

[[stage]]
name = "third"
total-steps = 3
reset-optimizer = true
"""


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def recipe(text: str = RECIPE, *arguments: str) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return parse_recipe(["--config", str(path), *arguments])

    return recipe


def begun(recipe: Recipe, dp_size: int = 1) -> Stages:
    return resume_stages(plan_stages(recipe, dp_size), {}, 0)[0]


def test_stages_follow_one_another(written: Any) -> None:
    stages = begun(written())
    assert (stages.current.name, stages.first_step, stages.last_step, stages.end) == ("first", 0, 4, 11)
    assert stages.current.samples_per_step == 2 and stages.lasting() == (4,)
    assert stages.advance()
    assert (stages.current.name, stages.first_step, stages.last_step, stages.end) == ("second", 4, 8, 11)
    assert stages.advance() and stages.lasting() == (4, 8, 11)
    assert not stages.advance() and stages.label() == {"stage": "third"}
    assert begun(written(), dp_size=2).planned[1].config.training.total_steps == 2


def test_a_run_without_stages_counts_from_step_0(tmp_path: Path) -> None:
    recipe = parse_recipe(["--tokenizer-path", "t", "--total-steps", "9"])
    stages, line = resume_stages(plan_stages(recipe, 1), {}, 5)
    assert (stages.first_step, stages.last_step, line) == (0, 9, None)
    assert stages.label() == {} == stages.metadata(5) and stages.lasting() == ()


def saved_at(recipe: Recipe, step: int) -> dict[str, Any]:
    """What the checkpoint after ``step`` steps keeps."""
    stages = begun(recipe)
    while step > stages.last_step:
        assert stages.advance()
    return stages.metadata(step)


@pytest.mark.parametrize(
    ("step", "name", "first"),
    [(1, "first", 0), (3, "first", 0), (4, "second", 4), (7, "second", 4), (8, "third", 8), (11, "third", 8)],
)
def test_a_resume_stands_where_the_checkpoint_was(written: Any, step: int, name: str, first: int) -> None:
    stages, line = resume_stages(plan_stages(written(), 1), saved_at(written(), step), step)
    assert (stages.current.name, stages.first_step, stages.end, line) == (name, first, 11, None)
    assert stages.metadata(step) == saved_at(written(), step) or step in (4, 8)
    assert stages.lasting()[-1] == stages.last_step


def test_a_checkpoint_without_stages_is_where_a_recipe_begins(written: Any) -> None:
    stages, _ = resume_stages(plan_stages(written(), 1), {"global_step": 25}, 25)
    assert (stages.current.name, stages.first_step, stages.last_step) == ("first", 25, 29)


ADDED = '[[stage]]\nname = "extra"\ntotal-steps = 2\n\n'


@pytest.mark.parametrize(
    ("step", "old", "new", "expected"),
    [
        (4, "total-steps = 4", "total-steps = 5", "stage first is finished .* total-steps was 4, is 5"),
        (9, "learning-rate = 1e-3", "learning-rate = 2e-3", "stage second .* learning-rate was 0.001, is"),
        (9, "total-tokens = 100", "total-tokens = 200", "stage second .* total-tokens was 100, is 200"),
        (9, '"other/*.parquet"', '"new"', r"stage second .* data-glob was other/\*.parquet, is new"),
        (9, "warmup-steps = 0", "warmup-steps = 1", "stage first is finished .* warmup-steps was 0, is 1"),
        (5, "batch-size = 2", "batch-size = 4", "stage first is finished .* global-batch-size was 2, is 4"),
        (4, '"first"', '"begin"', "stage first, which is finished, is no longer in the recipe"),
        (5, '"second"', '"2nd"', "stage second, which stands at step 5, is no longer in the recipe"),
        (5, '[[stage]]\nname = "first"', ADDED + '[[stage]]\nname = "first"',
         "stage first, which is finished, was stage 1 of the recipe and is now stage 2, after extra"),
        (5, '[[stage]]\nname = "second"', ADDED + '[[stage]]\nname = "second"',
         "stage second, which stands at step 5, was stage 2 of the recipe and is now stage 3, after extra"),
    ],
)  # fmt: skip
def test_what_is_done_cannot_be_changed(written: Any, step: int, old: str, new: str, expected: str) -> None:
    saved = saved_at(written(), step)
    assert old in RECIPE
    with pytest.raises(ConfigError, match=expected) as caught:
        resume_stages(plan_stages(written(RECIPE.replace(old, new)), 1), saved, step)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and "--config" in str(caught.value)


@pytest.mark.parametrize(
    ("step", "old", "new", "expected"),
    [
        (3, "total-steps = 4", "total-steps = 5", "first (total-steps was 4, is 5)"),
        (5, "total-steps = 3", "total-steps = 5", "third (total-steps was 3, is 5)"),
        (4, '[[stage]]\nname = "second"', ADDED + '[[stage]]\nname = "second"', "extra is new"),
        (5, '"third"', '"3rd"', "third is gone; 3rd is new"),
        (5, "reset-optimizer = true\n", "", "third (reset-optimizer was true, is false)"),
    ],
)
def test_what_lies_ahead_may_change(written: Any, step: int, old: str, new: str, expected: str) -> None:
    saved = saved_at(written(), step)
    stages, line = resume_stages(plan_stages(written(RECIPE.replace(old, new)), 1), saved, step)
    assert line == f"Changed in the stages ahead: {expected}"
    assert stages.index == (0 if step < 4 else 1)


def test_stages_are_added_to_a_finished_recipe(written: Any) -> None:
    saved = saved_at(written(), 11)
    stages, line = resume_stages(plan_stages(written(RECIPE + ADDED), 1), saved, 11)
    assert (stages.current.name, stages.first_step, stages.last_step) == ("extra", 11, 13)
    assert line == "Changed in the stages ahead: extra is new"


def test_the_layout_and_validation_may_change_in_finished_stages(written: Any) -> None:
    saved = saved_at(written(), 9)
    same = RECIPE.replace("batch-size = 2", "batch-size = 1\nglobal-batch-size = 2\neval-interval = 7")
    stages, line = resume_stages(plan_stages(written(same), 2), saved, 9)
    assert stages.current.name == "third" and line is None


def test_damaged_stages_of_a_checkpoint_are_refused(written: Any) -> None:
    for stages in ([{"name": "x"}], ["x"], [{"name": "x", "first_step": "y", "finished": 1, "settings": {}}]):
        with pytest.raises(CheckpointError, match="cannot be understood"):
            resume_stages(plan_stages(written(), 1), {"stages": stages}, 3)


def source(*globs: str, key: str = "") -> dict[str, Any]:
    return {"key": key or globs[0], "globs": list(globs)}


def test_places_of_data_that_a_stage_does_not_read_are_kept(written: Any) -> None:
    first, second, third = (stage.config for stage in begun(written()).planned)
    (here,) = first.data.data_glob
    place = {"data_position": {"row": 5}, "data_state": {"samples": 3, "block_size": 8}}
    metadata: dict[str, Any] = {**place, "data_source": source(here)}
    assert metadata_for(second, metadata, new_stage=True) == {}
    assert metadata_for(second, metadata, new_stage=False)["data_position"] == {"row": 5}
    places = places_beside(second, metadata)
    assert places == {here: place} and places_beside(first, metadata) == {}
    after: dict[str, Any] = {
        "data_position": {"row": 9}, "data_state": {"block_size": 16}, "data_places": places,
        "data_source": source("other/*.parquet"),
    }  # fmt: skip
    assert metadata_for(third, after, new_stage=True) == place
    assert places_beside(third, after).keys() == {"other/*.parquet"}


def test_a_mixture_keeps_its_places_by_name(written: Any) -> None:
    one, two, three = (
        dataclasses.replace(begun(written()).planned[0].config, data=DataOptions(tokenizer_path="t", **given))
        for given in (
            {"data_mix": (MixedSource("a", "1", "a/*"), MixedSource("b", "2", "b/*"))},
            {"data_mix": (MixedSource("c", "1", "c/*"),)},
            {"data_glob": ("d/*",)},
        )
    )
    place = {"data_position": {"sources": {}}, "data_state": {"block_size": 8}}
    metadata: dict[str, Any] = {**place, "data_source": source("a/*", "b/*", key="mixture")}
    assert metadata_for(two, metadata, new_stage=True) == place  # the data room tells the names apart
    assert metadata_for(three, metadata, new_stage=True) == {}
    places = places_beside(three, metadata)
    assert places == {"mixture": place} and places_beside(two, metadata) == {}
    alone = {**place, "data_source": source("d/*"), "data_places": places}
    assert metadata_for(one, alone, new_stage=True) == place
    assert metadata_for(one, {**place, "data_source": source("b/*")}, new_stage=True) == place
    assert metadata_for(one, {**place, "data_source": source("d/*")}, new_stage=True) == {}


def test_a_shuffled_place_means_something_at_one_block_size_only(written: Any) -> None:
    first = begun(written()).planned[0].config
    shuffled = dataclasses.replace(first, data=dataclasses.replace(first.data, streaming=False))
    assert data_source(shuffled)["key"] == f"{first.data.data_glob[0]} in blocks of 8"
    metadata = {"data_position": {"sample": 5}, "data_state": {}, "data_source": source("x in blocks of 8")}
    assert metadata_for(shuffled, metadata, new_stage=True) == {}
