"""Validation sets of token ids: the first samples, the bytes of their text, and what is read of what."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from argonne.data import token_stream
from argonne.data.held_out import check_data, read_held_out
from argonne.data.position import DataPosition
from argonne.data.source import DataProgress, MixPart, StreamingSource
from argonne.data.token_stream import open_shards
from argonne.errors import DataError
from argonne.testing.sources import source_options
from tests.data.shard_samples import write_column
from tests.data.token_samples import write_flat, write_lists

EOS = 0


class Letters:
    """A tokenizer of the letters a to z; 27 is a letter of two bytes, 0 ends documents."""

    eos_token_id = EOS

    def __len__(self) -> int:
        return 28

    def get_vocab(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate("_abcdefghijklmnopqrstuvwxyzä")}

    def decode(self, ids: np.ndarray, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join("_abcdefghijklmnopqrstuvwxyzä"[token] for token in ids.tolist() if token)


ROWS = [[1, 2, 3, 0], [27, 27, 0], [4, 5, 6, 7, 8, 0]]
OPTIONS = source_options("train/*.parquet", block_size=4, token_column="ids", packing=False)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are not read ten thousand times."""
    monkeypatch.setattr(token_stream, "BATCH_TOKENS", 16)


def test_the_first_samples_of_the_packed_rows(tmp_path: Path) -> None:
    path = write_lists(tmp_path / "a.parquet", ROWS, pa.list_(pa.int32()))
    found = read_held_out("web", str(path), OPTIONS, Letters(), 2)
    assert found.name == "web" and found.tokens.dtype == np.int32
    assert found.tokens.tolist() == [[1, 2, 3, 0, 27], [27, 27, 0, 4, 5]]
    assert found.text_bytes == len("abcääde".encode())  # of the nine ids, EOS left out


def test_a_small_set_is_repeated_as_in_training(tmp_path: Path) -> None:
    path = write_flat(tmp_path / "a.bin", [1, 2, 3])
    found = read_held_out("web", str(path), OPTIONS, Letters(), 2)
    assert found.tokens.tolist() == [[1, 2, 3, 1, 2], [2, 3, 1, 2, 3]]
    assert found.text_bytes == 9


def test_errors_name_the_set_and_its_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--eval-data web: .*--eval-data") as caught:
        read_held_out("web", f"{tmp_path}/*.parquet", OPTIONS, Letters(), 1)
    assert "--data-glob" not in str(caught.value)
    path = write_lists(tmp_path / "a.parquet", [[1, 28]], pa.list_(pa.int32()))
    with pytest.raises(DataError, match=r"^--eval-data web: .*the id 28 is beyond the vocabulary of 28"):
        read_held_out("web", str(path), OPTIONS, Letters(), 1)


def test_only_some_shards_that_are_trained_on_are_neither_one_nor_the_other(tmp_path: Path) -> None:
    for name in "ab":
        write_lists(tmp_path / f"{name}.parquet", ROWS, pa.list_(pa.int32()))
    trained = replace(OPTIONS, data_glob=f"{tmp_path}/a.parquet", holdout=2)
    with pytest.raises(DataError, match=r"1 of 2 shards are trained on, and --holdout leaves only"):
        read_held_out("web", f"{tmp_path}/*.parquet", trained, Letters(), 1)
    other = read_held_out("web", f"{tmp_path}/b.parquet", trained, Letters(), 1)
    assert other.tokens.tolist() == [[1, 2, 3, 0, 27]]  # no part of the training: read whole


def test_shards_that_are_trained_on_give_their_held_out_documents(tmp_path: Path) -> None:
    rows = [[1 + number, 1 + number, 1 + number, EOS] for number in range(26)]
    path = write_lists(tmp_path / "a.parquet", rows, pa.list_(pa.int32()))
    trained = replace(OPTIONS, data_glob=str(path), holdout=3)
    held = read_held_out("web", str(path), trained, Letters(), 3).tokens[:, :-1].tolist()
    assert all(row in rows for row in held) and held != rows[:3]
    options = replace(trained, packing=True, samples_per_step=6, vocab_size=28)
    shards = open_shards(options)[1]
    start = DataPosition(file_name=shards[0].name, block_size=4)
    training = StreamingSource(shards, None, options, DataProgress(position=start), eos=EOS)
    seen = training.take(26).tokens[:, :-1].tolist()  # more than an epoch
    assert all(row in rows for row in seen) and not any(row in seen for row in held)
    mixed = replace(trained, data_glob="elsewhere/*", mix=(MixPart("x", "1", str(path)),))
    assert read_held_out("web", str(path), mixed, Letters(), 3).tokens[:, :-1].tolist() == held


def test_data_ahead_is_opened_to_be_sure(tmp_path: Path) -> None:
    write_lists(tmp_path / "a.parquet", ROWS, pa.list_(pa.int32()))
    write_column(tmp_path / "t.parquet", ["text"])
    here = replace(OPTIONS, data_glob=f"{tmp_path}/a.parquet")
    check_data(here)
    check_data(here, held_out=("web", f"{tmp_path}/t.parquet"))  # of text beside ids
    with pytest.raises(DataError, match=r"^--eval-data web: "):
        check_data(here, held_out=("web", f"{tmp_path}/none/*"))
    with pytest.raises(DataError, match="none"):
        check_data(replace(here, data_glob=f"{tmp_path}/none/*"))
    mixed = replace(
        here, mix=(MixPart("good", "1", f"{tmp_path}/a.parquet"), MixPart("bad", "1", f"{tmp_path}/none/*"))
    )
    with pytest.raises(DataError, match="bad"):
        check_data(mixed)
    check_data(replace(mixed, mix=mixed.mix[:1]))


def test_a_set_is_packed_whatever_the_training_does(tmp_path: Path) -> None:
    write_flat(tmp_path / "a.bin", [1, 2, 3])  # which --no-packing and --holdout would refuse
    check_data(replace(OPTIONS, holdout=5), held_out=("web", f"{tmp_path}/a.bin"))
