"""Batches of a source of token ids: rows are documents, or blocks of a stream in which EOS ends them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from argonne.data import token_stream
from argonne.data.documents import Counts, Document
from argonne.data.position import DataPosition
from argonne.data.token_rows import TokenRow
from argonne.data.token_stream import open_shards, source_by_columns, token_batches, with_vocabulary
from argonne.errors import DataError
from argonne.testing.sources import source_options
from tests.data.shard_samples import write_column
from tests.data.token_samples import write_flat, write_lists

EOS = 9
ROWS = ([1, 2, 9], [3, 9, 4], [5, 6, 7], [9], [8, 8])


def documents(is_block: bool, rows: tuple[int, ...] = (0, 1, 2, 3, 4), epoch: int = 0) -> Iterator[Document]:
    for row in rows:
        ids = np.array(ROWS[row], dtype=np.int32)
        yield Document(epoch, 0, row, TokenRow(ids, is_block), Counts(documents=row), 0)


def batch(is_block: bool, start: DataPosition | None = None, rows: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Any:
    (found,) = token_batches(documents(is_block, rows), start or DataPosition(), EOS)
    return found


def test_each_row_is_a_document() -> None:
    found = batch(False)
    assert found.ids.tolist() == [1, 2, 9, 3, 9, 4, 5, 6, 7, 9, 8, 8] and found.ids.dtype == np.int32
    assert [(place, token) for place, token, _ in found.beginnings] == [
        (0, 0),
        (3, 0),
        (6, 0),
        (9, 0),
        (10, 0),
    ]
    assert [Document.from_mark(mark).row for *_, mark in found.beginnings] == [0, 1, 2, 3, 4]
    assert found.starts is None  # the beginnings tell


def test_in_blocks_what_follows_an_eos_begins_a_document() -> None:
    # 1 2 9 | 3 9 4 | 5 6 7 | 9 | 8 8: after the EOS at 2, 4 and 9, and the first token.
    assert batch(True).starts.tolist() == [0, 3, 5, 10]


def test_a_block_that_does_not_follow_begins_anew() -> None:
    found = batch(True, rows=(0, 2, 4))  # 1 2 9 | 5 6 7 | 8 8
    assert found.starts.tolist() == [0, 3, 6]
    again: list[Any] = [*documents(True, (1, 2)), *documents(True, (2,), epoch=1)]
    (found,) = token_batches(iter(again), DataPosition(), EOS)
    assert found.starts is not None and found.starts.tolist() == [0, 2, 6]


@pytest.mark.parametrize("is_block", [False, True])
def test_used_ids_are_left_out(is_block: bool) -> None:
    found = batch(is_block, DataPosition(row=1, token_offset=1), rows=(1, 2))
    assert found.ids.tolist() == [9, 4, 5, 6, 7]
    assert [(place, token) for place, token, _ in found.beginnings] == [(0, 1), (2, 0)]
    if is_block:
        assert found.starts.tolist() == [1]  # the token behind the EOS; 9 itself continues what was used
    past = batch(is_block, DataPosition(row=1, token_offset=3), rows=(1, 2))
    assert past.ids.tolist() == [5, 6, 7]
    other = batch(is_block, DataPosition(row=0, token_offset=2), rows=(1, 2))
    assert other.ids.tolist() == [3, 9, 4, 5, 6, 7]  # row 0 is skipped: nothing of row 1 was used


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_the_size_of_batches_leaves_no_trace(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batch(True)
    monkeypatch.setattr(token_stream, "BATCH_TOKENS", size)
    found = list(token_batches(documents(True), DataPosition(), EOS))
    firsts = np.cumsum([0, *(len(one.ids) for one in found)])
    assert np.concatenate([one.ids for one in found]).tolist() == whole.ids.tolist()
    starts = [place + first for one, first in zip(found, firsts, strict=False) for place in one.starts]  # type: ignore[union-attr]
    assert starts == whole.starts.tolist()
    marks = [
        (at + first, *rest) for one, first in zip(found, firsts, strict=False) for at, *rest in one.beginnings
    ]
    assert marks == whole.beginnings
    assert len(found) == {1: 5, 3: 4, 4: 3, 100: 1}[size]


def test_flat_files_need_no_flag_and_have_no_documents(tmp_path: Path) -> None:
    write_flat(tmp_path / "a.bin", [1, 2, 3])
    options = source_options(f"{tmp_path}/*")
    found, shards = open_shards(options)
    assert (found.token_column, [shard.name for shard in shards]) == ("", ["a.bin"])
    with pytest.raises(DataError, match=r"--no-packing cuts documents, and a flat token file \(a\.bin\)"):
        open_shards(replace(options, packing=False))
    with pytest.raises(DataError, match=r"--holdout takes documents out, and a flat token file \(a\.bin\)"):
        open_shards(replace(options, holdout=5))
    write_column(tmp_path / "b.parquet", ["text"])
    with pytest.raises(DataError, match=r"1 of 2 shards are flat token files \(a\.bin\).*--data-mix"):
        open_shards(options)


def test_a_source_is_of_the_kind_that_its_first_shard_has(tmp_path: Path) -> None:
    write_column(tmp_path / "text.parquet", ["text"])
    write_lists(tmp_path / "ids.parquet", [[1, 2]], pa.list_(pa.int32()))
    write_column(tmp_path / "other.parquet", ["text"], name="content")
    options = source_options("elsewhere/*", token_column="ids")
    for name, column in (("text", None), ("ids", "ids"), ("other", "ids")):
        found = source_by_columns(options, f"{tmp_path}/{name}.parquet")
        assert (found.token_column, found.data_glob) == (column, f"{tmp_path}/{name}.parquet"), name
    plain = replace(options, token_column=None)
    assert source_by_columns(plain, f"{tmp_path}/ids.parquet").token_column is None
    with pytest.raises(DataError):
        source_by_columns(options, f"{tmp_path}/none*.parquet")


def test_the_vocabulary_is_the_models_or_all_that_the_tokenizer_has() -> None:
    class Tokenizer:
        def __len__(self) -> int:
            return 3

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "added": 7}  # with a gap

    options = source_options("a/*")
    assert with_vocabulary(options, Tokenizer()).vocab_size == 8
    assert with_vocabulary(replace(options, vocab_size=5), SimpleNamespace()).vocab_size == 5
