"""Flat token files of the public layout: header, blocks, positions, and files that are none."""

from pathlib import Path

import numpy as np
import pytest

from argonne.data import flat_tokens
from argonne.data.flat_tokens import (
    FlatReader,
    block_position,
    file_position,
    flat_header,
    is_flat,
    read_header,
)
from argonne.data.position import DataPosition
from argonne.data.texts import ShardError
from argonne.data.token_rows import TokenRow
from tests.data.token_samples import write_flat


def ids_of(reader: FlatReader, group: int) -> list[int]:
    (batch,) = reader.batches(group)
    (row,) = batch.texts
    assert isinstance(row, TokenRow) and row.is_block and row.ids.dtype == np.int32
    return row.ids.tolist()


@pytest.fixture
def blocks_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_tokens, "BLOCK_TOKENS", 4)


def test_the_header_is_that_of_the_public_layout() -> None:
    words = np.frombuffer(flat_header(3_000_000_000), "<u4")
    assert (len(words), words[:3].tolist(), words[3:].any()) == (256, [20240520, 1, 3_000_000_000], False)


@pytest.mark.parametrize(("dtype", "largest"), [("<u2", 65_535), ("<u4", 100_000)])
def test_blocks_are_rows(dtype: str, largest: int, tmp_path: Path, blocks_of_4: None) -> None:
    ids = [*range(9), largest]
    with FlatReader(write_flat(tmp_path / "a.bin", ids, dtype)) as reader:
        assert (reader.group_rows, reader.token_count(), reader.null_rows()) == ((1, 1, 1), 10, 0)
        assert reader.text_bytes() == 10 * int(dtype[-1])
        assert [ids_of(reader, group) for group in range(3)] == [ids[:4], ids[4:8], ids[8:]]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    with FlatReader(write_flat(tmp_path / "a.bin", [])) as reader:
        assert reader.group_rows == () and reader.token_count() == 0


def test_an_id_beyond_the_vocabulary_is_named_by_its_place_in_the_file(
    tmp_path: Path, blocks_of_4: None
) -> None:
    with FlatReader(write_flat(tmp_path / "a.bin", [1, 2, 3, 4, 5, 60, 70]), vocab_size=60) as reader:
        assert ids_of(reader, 0) == [1, 2, 3, 4]
        with pytest.raises(ShardError, match="token 5 of the file: the id 60 is beyond the vocabulary of 60"):
            ids_of(reader, 1)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = write_flat(tmp_path / "a.bin", list(range(10)))
    with FlatReader(path) as reader:
        with path.open("r+b") as file:
            file.truncate(1030)
        with pytest.raises(ShardError, match="it was cut while it was read"):
            ids_of(reader, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"magic": 20240521}, "its first number is 20240521, not 20240520"),
        ({"version": 2}, "version 2 of the flat token layout, only 1 is known"),
        ({"count": 7}, "its header says 7 tokens, and its 1044 bytes hold neither"),
    ],
)
def test_a_header_of_another_layout(change: dict[str, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=said):
        FlatReader(write_flat(tmp_path / "a.bin", range(10), **change))  # type: ignore[arg-type]
    with pytest.raises(ShardError, match="5 bytes: shorter than the header"):
        read_header(b"12345", 5)


@pytest.mark.parametrize("token", [0, 3, 4, 5, 11, 12])
def test_positions_of_file_and_block_are_one_place(token: int, blocks_of_4: None) -> None:
    saved = DataPosition(epoch=2, file_index=1, file_name="x/a.bin", token_offset=token, block_size=8)
    block = block_position(saved)
    assert (block.row, block.token_offset) == divmod(token, 4)
    assert file_position(block) == saved and (block.epoch, block.file_index) == (2, 1)
    text = DataPosition(file_name="a.parquet", row=3, token_offset=9)
    assert block_position(text) is text and file_position(text) is text


def test_flat_files_are_known_by_their_names() -> None:
    assert is_flat("a.bin") and is_flat(Path("b/a.bin")) and not is_flat("a.bin.parquet")
