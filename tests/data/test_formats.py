"""Text columns of every layout, format and codec; skipped and replaced rows; long texts; Arrow files."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import argonne.data.texts as data_texts
from argonne.data.formats import open_shard
from argonne.data.shards import open_corpus
from tests import ROOT
from tests.data.shard_samples import texts_of, write_column


def text_array(values: list[bytes | None]) -> pa.Array:
    """A string array whose bytes nobody checked."""
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    "type_",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow-stream", "arrow-file"])
def test_every_text_layout_and_format_reads_alike(tmp_path: Path, type_: pa.DataType, suffix: str) -> None:
    texts = ["one", None, "", "zwei", "trois", "zwei", None, "fünf"]
    values = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(type_) else pa.array(texts)
    table = pa.table({"id": pa.array(range(8)), "text": values.cast(type_)})
    if suffix == "parquet":
        path = tmp_path / "a.parquet"
        try:
            pq.write_table(table, path, row_group_size=3)
        except pa.ArrowNotImplementedError as error:
            pytest.skip(f"this pyarrow writes no such parquet: {error}")
    else:
        path = tmp_path / "a.arrow"
        writer = pa.ipc.new_stream if suffix == "arrow-stream" else pa.ipc.new_file
        with writer(str(path), table.schema) as sink:
            sink.write_table(table.combine_chunks(), max_chunksize=3)
    shard = open_corpus(str(path), "text")[0]
    assert shard.group_rows == (3, 3, 2) and [shard.group_of(row) for row in (0, 2, 3, 7, 8)] == [
        0,
        0,
        1,
        2,
        3,
    ]
    with open_shard(path, "text") as reader:
        for order in ([0, 1, 2], [2, 0, 1]):  # any order: a resume begins anywhere
            groups = {
                group: [text for batch in reader.batches(group) for text in batch.texts] for group in order
            }
            assert groups[0] + groups[1] + groups[2] == texts


def test_a_datasets_folder_can_be_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(10)]}).save_to_disk(
        str(tmp_path / "d"), num_shards=2
    )
    shards = open_corpus(f"{tmp_path}/d/*.arrow", "text")
    assert [shard.rows for shard in shards] == [5, 5]


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_any_codec(tmp_path: Path, tokenizer: Any, codec: str) -> None:
    pq.write_table(
        pa.table({"text": ["hello world and all that"] * 20}), tmp_path / "a.parquet", compression=codec
    )
    assert texts_of(tmp_path, tokenizer)[0].startswith("hello world")


def test_skipped_and_replaced_rows_are_counted_once(tmp_path: Path, tokenizer: Any) -> None:
    values = [
        b"good text here",
        None,
        b"",
        b"bad \xff\xfe bytes",
        b"",
        None,
        None,
        "schön".encode(),
        b"cut \xc3",
    ]
    table = pa.table({"text": text_array(values * 3)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(0, 0), tmp_path / "b.parquet")  # no rows, no trouble
    clean = tmp_path / "clean"
    clean.mkdir()
    replaced = [value if value is None else value.decode("utf-8", errors="replace") for value in values]
    write_column(clean / "a.parquet", replaced * 3)
    text, progress = texts_of(tmp_path, tokenizer, steps=6)
    expected, same = texts_of(clean, tokenizer, steps=6)
    assert "�" in text and text == expected
    assert progress.counts._replace(replaced_rows=0) == same.counts and same.counts.replaced_rows == 0
    passed = [replaced * 9][0][: progress.position.row + progress.position.epoch * len(values) * 3]
    assert progress.counts.null_rows == sum(value is None for value in passed)
    assert progress.counts.empty_rows == passed.count("")
    assert progress.counts.documents == sum(bool(value) for value in passed)
    assert progress.counts.replaced_rows == sum("�" in (value or "") for value in passed)


def test_long_texts_read_as_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text in stretches: the same characters and replacements, wherever a stretch ends."""
    alphabet = [
        b"a",
        "ü".encode(),
        "你".encode(),
        "😀".encode(),
        b"\xff",
        b"\xe4\xbd",
        b"\xf0\x9f\x98",
        b"\xc3",
        b"\n",
    ]
    rng = np.random.default_rng(5)
    values: list[bytes | None] = [
        b"".join(alphabet[index] for index in rng.integers(0, len(alphabet), int(rng.integers(0, 40))))
        for _ in range(300)
    ]
    values += [None, b"", "ganz gültig, 你好 😀".encode()]
    whole = data_texts.to_texts(text_array(values))
    monkeypatch.setattr(data_texts, "LONG_BYTES", 10)
    monkeypatch.setattr(data_texts, "BATCH_BYTES", 3)
    longs = data_texts.to_texts(text_array(values))
    assert sum(isinstance(text, data_texts.LongText) for text in longs.texts) > 100
    assert longs.replaced == whole.replaced
    for value, text in zip(values, longs.texts, strict=True):
        together = "".join(text.stretches()) if isinstance(text, data_texts.LongText) else text
        assert together == (None if value is None else value.decode("utf-8", errors="replace"))


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_damaged_arrow_file_is_an_error_and_kills_nothing(
    tmp_path: Path, type_: pa.DataType, kind: str
) -> None:
    """Flipped bits all over an Arrow file, whose buffers are used as they are mapped."""
    texts = [f"text number {number}, longer than twelve bytes" for number in range(8)]
    table, path = pa.table({"text": pa.array(texts, type_)}), tmp_path / "a.arrow"
    with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), table.schema) as sink:
        sink.write_table(table, max_chunksize=4)
    whole = path.read_bytes()
    script = READ_DAMAGED.format(root=str(ROOT), path=str(path))
    for seed in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script, str(seed), str(len(whole))], capture_output=True, text=True
        )
        assert done.returncode == 0, (seed, done.stderr[-2000:])
        assert int(done.stdout) > 20
        path.write_bytes(whole)


READ_DAMAGED = """
import random, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import pyarrow as pa
from argonne.data.formats import open_shard, read_footer
from argonne.data.texts import ShardError

path, rng, errors = Path({path!r}), random.Random(int(sys.argv[1])), 0
whole = path.read_bytes()
for _ in range(200):
    place = rng.randrange(len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
    try:
        groups = len(read_footer(path, "text").group_rows)
        with open_shard(path, "text") as reader:
            for group in range(groups):
                for _ in reader.batches(group):
                    pass
    except (ShardError, pa.ArrowException, OSError):
        errors += 1
print(errors)
"""


def test_an_arrow_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    table, path = pa.table({"text": ["some text"] * 5000}), tmp_path / "a.arrow"
    with pa.ipc.new_file(str(path), table.schema) as sink:
        sink.write_table(table)
    with open_shard(path, "text") as reader:
        batches = reader.batches(0)
        next(batches)
        os.truncate(path, 100)
        with pytest.raises(data_texts.ShardError, match="cut while it was read"):
            next(batches)
