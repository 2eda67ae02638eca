"""Places that stages leave in the data: which key names them, which of them a stage takes up or keeps."""

from pathlib import Path
from typing import Any

from argonne.config.mixture import MixedSource
from argonne.config.options import DataOptions, RunConfig
from argonne.training.data_places import data_source, metadata_for, places_beside
from tests.training.small_run import run_config, training_options


def config(*globs: str, block_size: int = 16, **data: Any) -> RunConfig:
    options = DataOptions(tokenizer_path="t", data_glob=globs, **data)
    return run_config(Path(), data=options, training=training_options(block_size=block_size))


def left(source: dict[str, Any], row: int, **more: Any) -> dict[str, Any]:
    """The keys of a checkpoint of a stage that read ``source``."""
    return {**place(row), "data_source": source, **more}


def place(row: int) -> dict[str, Any]:
    return {"data_position": {"row": row}, "data_state": {"block_size": 16, "samples": row}}


def test_the_key_names_the_globs_the_mixture_or_the_order() -> None:
    assert data_source(config("a/*", "b/*")) == {"key": "a/* b/*", "globs": ["a/*", "b/*"]}
    shuffled = config("a/*", streaming=False)
    assert data_source(shuffled) == {"key": "a/* in blocks of 16", "globs": []}
    mix = (MixedSource("web", "1", "a/*"), MixedSource("code", "2", "b/*"))
    assert data_source(config("x/*", data_mix=mix)) == {"key": "mixture", "globs": ["a/*", "b/*"]}


def test_one_glob_in_common_is_the_same_data() -> None:
    before = left(data_source(config("a/*", "b/*")), 5)
    assert metadata_for(config("b/*", "c/*"), before, new_stage=True)["data_position"] == {"row": 5}
    assert metadata_for(config("c/*"), before, new_stage=True) == {}
    assert places_beside(config("b/*"), before) == {}
    assert places_beside(config("c/*"), before) == {"a/* b/*": place(5)}


def test_orders_of_two_block_sizes_have_nothing_in_common() -> None:
    before = left(data_source(config("a/*", streaming=False)), 5)
    assert metadata_for(config("a/*", streaming=False), before, new_stage=True) == place(5)
    assert metadata_for(config("a/*", streaming=False, block_size=32), before, new_stage=True) == {}
    assert metadata_for(config("a/*"), before, new_stage=True) == {}


def test_a_later_stage_finds_its_place_again_and_takes_it_from_the_kept_ones() -> None:
    first, second = config("a/*"), config("b/*")
    places = places_beside(second, left(data_source(first), 5))
    after = left(data_source(second), 7, data_places=places)
    assert metadata_for(first, after, new_stage=True) == place(5)
    assert places_beside(first, after) == {"b/*": place(7)}
    third = places_beside(config("c/*"), after)
    assert third == {"a/*": place(5), "b/*": place(7)} and after["data_places"] == {"a/*": place(5)}


def test_a_stage_may_change_the_block_size_of_a_stream() -> None:
    before = left(data_source(config("a/*")), 5)
    found = metadata_for(config("a/*", block_size=32), before, new_stage=True)
    assert found["data_state"] == {"block_size": 32, "samples": 5}
    assert before["data_state"]["block_size"] == 16
    resumed = metadata_for(config("a/*", block_size=32), before, new_stage=False)
    assert resumed["data_state"]["block_size"] == 16  # a resume compares it


def test_a_checkpoint_without_stages_or_data_has_nothing_to_keep() -> None:
    assert metadata_for(config("a/*"), {}, new_stage=True) == {}
    assert metadata_for(config("a/*"), place(5), new_stage=True) == place(5)
    assert metadata_for(config("a/*"), {"data_position": None, "data_state": None}, new_stage=False) == {}
    assert places_beside(config("a/*"), {"data_source": data_source(config("b/*"))}) == {}
