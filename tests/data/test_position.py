"""Positions: where a pipeline script's and our own go on, and what a checkpoint keeps of them."""

from dataclasses import replace

import numpy as np
import pytest

from argonne.data.position import DataPosition
from argonne.errors import DataError
from data_stream import open_stream
from tests.data.stream_reference import Reference, build_reference, opened, steps


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return build_reference(tmp_path_factory.mktemp("corpus"))


PIPELINE = {
    "streaming": True,
    "current_file_idx": 1,
    "position_in_file": 3,
    "chunk_offset": 1,
    "current_position": 0,
    "epoch": 2,
    "files_processed": ["000_00000.parquet", "000_00001.parquet"],
}


@pytest.mark.parametrize("block_size", [16, 9])
def test_a_pipeline_position_goes_on_behind_its_chunk(reference: Reference, block_size: int) -> None:
    options = replace(reference.options, block_size=block_size)
    source = open_stream(options, reference.tokenizer, saved_position=PIPELINE, global_step=40)
    place = reference.rows.index(("000_00001.parquet", 3))
    start = sum(map(len, reference.documents[:place])) + 2 * block_size
    (step,) = steps(source, 1)
    assert np.array_equal(step.tokens[0], reference.stream(start + block_size + 1)[start:])
    assert source.start.position.epoch == 2 and step.progress.samples == 4


def test_a_pipeline_position_past_the_row_or_before_any_step(reference: Reference) -> None:
    past = open_stream(
        reference.options, reference.tokenizer, saved_position=PIPELINE | {"chunk_offset": 999}, global_step=1
    )
    (step,) = steps(past, 1)
    place = reference.rows.index(("000_00001.parquet", 3)) + 1
    start = sum(map(len, reference.documents[:place]))
    assert np.array_equal(step.tokens[0], reference.stream(start + 17)[start:])
    unused = open_stream(
        reference.options, reference.tokenizer, saved_position=PIPELINE | {"chunk_offset": 0}, global_step=0
    )
    (step,) = steps(unused, 1)
    start -= len(reference.documents[place - 1])
    assert np.array_equal(step.tokens[0], reference.stream(start + 17)[start:])


@pytest.mark.parametrize(("file_index", "row"), [(0, 5), (0, 999), (1, 13), (2, 0)])
def test_a_pipeline_position_at_a_row_without_text(reference: Reference, file_index: int, row: int) -> None:
    """A skipped row, or a row past the shard's end: the next document begins at its first token."""
    name = f"000_{file_index:05d}.parquet"
    saved = PIPELINE | {"current_file_idx": file_index, "position_in_file": row, "epoch": 0}
    (step,) = steps(
        open_stream(reference.options, reference.tokenizer, saved_position=saved, global_step=9), 1
    )
    later = [index for index, place in enumerate(reference.rows) if place >= (name, row)]
    used = 32 if reference.rows[later[0]] == (name, row) else 0
    start = sum(map(len, reference.documents[: later[0]])) + used
    assert np.array_equal(step.tokens[0], reference.stream(start + 17)[start:])
    assert step.progress.position == replace(reference.place(start + 64, 16), epoch=0)


def test_positions_that_cannot_be_placed(reference: Reference) -> None:
    with pytest.raises(DataError, match=r"shard number 9 .* --data-glob gives 4"):
        open_stream(
            reference.options,
            reference.tokenizer,
            saved_position=PIPELINE | {"current_file_idx": 9},
            global_step=1,
        )
    with pytest.raises(DataError, match="--no-streaming"):
        open_stream(
            reference.options,
            reference.tokenizer,
            saved_position={"streaming": False, "current_position": 5},
            global_step=1,
        )


def test_the_position_dictionary_has_both_sets_of_keys(reference: Reference) -> None:
    options = replace(reference.options, block_size=100, samples_per_step=40)
    source = opened(reference, options)
    progress = next(steps(source, 1)).progress
    source.source.close()
    saved = source.position_dict(progress)
    assert set(saved) == set(PIPELINE) | {"file_name", "row", "token_offset"}
    assert saved["streaming"] is True and saved["row"] == saved["position_in_file"]
    assert saved["chunk_offset"] == saved["token_offset"] // 100
    assert saved["files_processed"][-1] == saved["file_name"]
    assert len(saved["files_processed"]) == saved["current_file_idx"] + 1
    restored = DataPosition.from_dict(saved, block_size=100, global_step=7)
    assert restored == progress.position
