"""Shards that are damaged or go bad while they are read: an error naming the place, or a recorded skip."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import argonne.testing.corpus as corpus
from argonne.errors import DataError
from data_stream import open_stream
from tests.data.shard_samples import options_for, resume, texts_of, write_column


def flip(path: Path, find: bytes) -> None:
    """Flip one bit of the file where ``find`` begins."""
    content = bytearray(path.read_bytes())
    content[content.index(find)] ^= 1
    path.write_bytes(content)


def shards_with_a_flipped_bit(folder: Path) -> list[str]:
    """Three shards of four row groups of two rows, the second with a bit flipped in row group 2."""
    texts = [f"This is text number {number:02d}, and no other." for number in range(24)]
    for path in corpus.write_shards(folder, texts, shards=3, row_group_rows=2):
        pq.write_table(
            pq.read_table(path),
            path,
            row_group_size=2,
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
            write_statistics=False,
        )
    flip(folder / "000_00001.parquet", b"number 12")
    return texts


def test_a_flipped_bit_is_an_error_naming_the_place(tmp_path: Path, tokenizer: Any) -> None:
    shards_with_a_flipped_bit(tmp_path)
    with pytest.raises(DataError, match=r"000_00001\.parquet, row group 2: .*--skip-bad-shards") as caught:
        texts_of(tmp_path, tokenizer, steps=200)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_a_recorded_skip_of_its_row_group(tmp_path: Path, tokenizer: Any) -> None:
    texts = shards_with_a_flipped_bit(tmp_path)
    expected = tokenizer.decode(
        [
            i
            for text in texts[:12] + texts[14:]
            for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ]
        * 2
    )
    options = options_for(tmp_path, skip_bad_shards=True)
    source = open_stream(options, tokenizer)
    steps = [source.source.next_step() for _ in range(40)]
    source.source.close()
    decoded = tokenizer.decode(np.concatenate([step.tokens[:, :-1].ravel() for step in steps]))
    assert expected.startswith(decoded) and len(decoded) > 0
    skip = {"epoch": 0, "file_name": "000_00001.parquet", "row_group": 2, "row": 4, "rows": 2}
    for index, step in enumerate(steps):
        passed = (
            step.progress.position.epoch > 0
            or step.progress.position.file_index * 8 + step.progress.position.row >= 14
        )
        assert len(step.progress.skipped) == passed
        if passed:
            assert step.progress.skipped[0].items() >= skip.items()
        resumed = resume(source, step.progress, options, tokenizer)
        if index + 1 < len(steps) and index % 5 == 0:
            again = resumed.source.next_step()
            assert again.progress == steps[index + 1].progress
            assert np.array_equal(again.tokens, steps[index + 1].tokens)
        resumed.source.close()
    assert len(steps[-1].progress.skipped) == 1


@pytest.mark.parametrize("damage", ["deleted", "rewritten", "cut"])
def test_a_shard_that_goes_bad_in_the_middle(tmp_path: Path, tokenizer: Any, damage: str) -> None:
    texts = corpus.short_texts(30, 600)
    paths = corpus.write_shards(tmp_path, texts, shards=3)
    for skip in (False, True):
        corpus.write_shards(tmp_path, texts, shards=3)
        source = open_stream(options_for(tmp_path, skip_bad_shards=skip), tokenizer).source
        if damage == "deleted":
            paths[1].unlink()
        elif damage == "cut":
            paths[1].write_bytes(paths[1].read_bytes()[:1000])
        else:
            write_column(paths[1], ["another"])
        if not skip:
            with pytest.raises(DataError, match=r"cannot read .*000_00001\.parquet: "):
                for _ in range(1000):
                    source.next_step()
        else:
            while (step := source.next_step()).progress.position.epoch == 0:
                pass
            assert [(s["file_name"], s["row"], s["rows"]) for s in step.progress.skipped] == [
                ("000_00001.parquet", 0, 10)
            ]
        source.close()


def test_a_touched_shard_goes_on_and_a_rewritten_one_of_the_same_size_does_not(
    tmp_path: Path, tokenizer: Any
) -> None:
    paths = [write_column(tmp_path / f"{i}.parquet", [f"row {i}{j}" for j in range(9)]) for i in range(2)]
    options = options_for(tmp_path)
    source = open_stream(options, tokenizer).source
    os.utime(paths[1], ns=(1, 1))
    while source.next_step().progress.position.epoch == 0:
        pass
    source.close()
    source, size = open_stream(options, tokenizer).source, paths[1].stat().st_size
    write_column(paths[1], [f"wor {1}{j}" for j in range(9)])
    assert paths[1].stat().st_size == size
    with pytest.raises(DataError, match=r"1\.parquet: it was rewritten since the run started"):
        while source.next_step().progress.position.epoch == 0:
            pass
    source.close()


def test_bad_shards_from_the_start_keep_their_place(tmp_path: Path, tokenizer: Any) -> None:
    paths = corpus.write_shards(tmp_path, corpus.short_texts(9, 50), shards=3)
    paths[1].write_bytes(b"PAR1")
    source = open_stream(options_for(tmp_path, skip_bad_shards=True), tokenizer)
    assert len(source.notices) == 1 and "000_00001.parquet" in source.notices[0]
    while (step := source.source.next_step()).progress.position.file_index == 0:
        pass
    source.source.close()
    assert step.progress.position.file_name == "000_00002.parquet" and step.progress.position.file_index == 2
    assert step.progress.skipped[0]["file_name"] == "000_00001.parquet"
