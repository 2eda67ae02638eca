"""Order, start-up check and identity of the shards, and what a resume asks of them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import argonne.data.documents as documents
import argonne.data.formats as data_formats
import argonne.data.shards as data_shards
import argonne.testing.corpus as corpus
from argonne.data.find_shards import find_shards, natural_key
from argonne.data.formats import open_shard
from argonne.data.parquet_reader import ParquetReader
from argonne.data.shard_reader import ShardReader
from argonne.data.shards import (
    manifest,
    manifest_difference,
    open_corpus,
)
from argonne.data.texts import TextBatch
from argonne.data.tokenizer import load_tokenizer
from argonne.errors import DataError
from data_stream import open_stream
from tests.data.shard_samples import options_for, resume, texts_of, write_column


def test_natural_order() -> None:
    names = [
        "b/000_10.parquet",
        "a/000_2.parquet",
        "A9.parquet",
        "a10.parquet",
        "c/000_2.parquet",
        "000.parquet",
    ]
    assert sorted(names, key=natural_key) == [
        "000.parquet",
        "a/000_2.parquet",
        "c/000_2.parquet",
        "b/000_10.parquet",
        "A9.parquet",
        "a10.parquet",
    ]


def test_find_shards_and_names(tmp_path: Path) -> None:
    for name in ["x/s_10.parquet", "x/s_9.parquet", "y/s_9.parquet", "y/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_shards(f"{tmp_path}/*/*.parquet")
    assert [str(Path(file.path).relative_to(tmp_path)) for file in found] == [
        "x/s_9.parquet",
        "y/s_9.parquet",
        "x/s_10.parquet",
    ]
    assert [file.name for file in found] == ["x/s_9.parquet", "y/s_9.parquet", "x/s_10.parquet"]
    assert [file.path for file in find_shards(str(tmp_path / "y"))] == [tmp_path / "y/s_9.parquet"]
    with pytest.raises(DataError, match=r"no shard matches '.*/\*\.json' \(--data-glob\)"):
        find_shards(f"{tmp_path}/*.json")


def test_every_bad_shard_is_named_at_once(tmp_path: Path) -> None:
    good = write_column(tmp_path / "s_0.parquet", ["some text"])
    (tmp_path / "s_1.parquet").touch()
    (tmp_path / "s_2.parquet").write_bytes(b"garbage" * 100)
    (tmp_path / "s_3.parquet").write_bytes(good.read_bytes()[:-20])
    write_column(tmp_path / "s_4.parquet", ["body"], name="content")
    write_column(tmp_path / "s_5.parquet", [1, 2])
    write_column(tmp_path / "s_6.parquet", [["a"], ["b"]])
    write_column(tmp_path / "s_7.parquet", [1.5])
    with pytest.raises(DataError) as caught:
        open_corpus(f"{tmp_path}/*.parquet", "text")
    message = str(caught.value)
    assert "\n" not in message and "7 of 8 shards" in message and "s_0.parquet" not in message
    for part in [
        "s_1.parquet: 0 bytes",
        "s_2.parquet: ",
        "s_3.parquet: ",
        "s_4.parquet: no column 'text' (columns: content: string, id: int64)",
        "s_5.parquet: column 'text' is int64",
        "s_6.parquet: column 'text' is list<",
        "s_7.parquet: column 'text' is double",
        "--skip-bad-shards",
    ]:
        assert part in message, part
    shards = open_corpus(f"{tmp_path}/*.parquet", "text", skip_bad_shards=True)
    assert [bool(shard.fault) for shard in shards] == [False] + [True] * 7


def test_a_shard_of_nulls_is_passed_over_with_a_warning(tmp_path: Path, tokenizer: Any) -> None:
    write_column(tmp_path / "a.parquet", ["some text"] * 5)
    write_column(tmp_path / "b.parquet", [None, None], pa.string())
    options = options_for(tmp_path, cache_dir=tmp_path / "cache")
    for _ in range(2):  # from the footers, then from the index
        source = open_stream(options, tokenizer)
        assert source.notices == ("without any text in 'text' (--text-column): b.parquet",)
        step = source.source.next_step()
        while step.progress.position.epoch == 0:
            step = source.source.next_step()
        source.source.close()
        assert step.progress.counts.null_rows == 2 and step.progress.skipped == ()


def test_a_missing_column_names_the_flag(tmp_path: Path) -> None:
    write_column(tmp_path / "a.parquet", ["some"], name="content")
    with pytest.raises(DataError, match=r"columns: content: string, id: int64.*--text-column"):
        open_corpus(f"{tmp_path}/*.parquet", "text")
    assert open_corpus(f"{tmp_path}/*.parquet", "content")[0].rows == 1


def test_empty_corpora_are_errors(tmp_path: Path, tokenizer: Any) -> None:
    write_column(tmp_path / "a.parquet", [], pa.string())
    with pytest.raises(DataError, match="hold no row"):
        open_corpus(f"{tmp_path}/*.parquet", "text")
    write_column(tmp_path / "b.parquet", ["", "", None])
    with pytest.raises(DataError, match="hold no text"):
        texts_of(tmp_path, tokenizer)


def changed(folder: Path, change: str) -> None:
    """Change the list of shards, which is part of a position."""
    texts = corpus.short_texts(20, 100)
    if change == "removed":
        (folder / "000_00001.parquet").unlink()
    elif change == "renamed":
        (folder / "000_00001.parquet").rename(folder / "000_00007.parquet")
    elif change == "rewritten":
        rows = pq.read_table(folder / "000_00001.parquet")["text"].to_pylist()
        write_column(folder / "000_00001.parquet", rows[::-1])
    elif change == "inserted":
        write_column(folder / "000_00000b.parquet", texts)
    elif change == "appended":
        write_column(folder / "000_00010.parquet", texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("removed", "removed: 000_00001.parquet"),
        ("renamed", "removed: 000_00001.parquet"),
        ("rewritten", r"rewritten: 000_00001.parquet \(\d+ rows, \d+ bytes -> "),
        ("inserted", "added before the end: 000_00000b.parquet"),
    ],
)
def test_a_changed_file_list_stops_the_resume(
    tmp_path: Path, tokenizer: Any, change: str, message: str
) -> None:
    corpus.write_shards(tmp_path, corpus.short_texts(30, 100), shards=3)
    options = options_for(tmp_path)
    source = open_stream(options, tokenizer)
    while (step := source.source.next_step()).progress.position.file_index < 1:
        pass
    source.source.close()
    changed(tmp_path, change)
    with pytest.raises(DataError, match=f"{message}.*--allow-data-change"):
        resume(source, step.progress, options, tokenizer)
    forced = resume(source, step.progress, replace(options, allow_data_change=True), tokenizer)
    assert any(message.split(":")[0] in notice for notice in forced.notices)
    forced.source.next_step()
    forced.source.close()


def test_appended_shards_and_a_moved_folder_continue(tmp_path: Path, tokenizer: Any) -> None:
    corpus.write_shards(tmp_path / "old", corpus.short_texts(30, 100), shards=3)
    options = options_for(tmp_path / "old")
    source = open_stream(options, tokenizer)
    steps = [source.source.next_step() for _ in range(20)]
    source.source.close()
    changed(tmp_path / "old", "appended")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    again = resume(source, steps[9].progress, options_for(tmp_path / "new"), tokenizer)
    assert again.notices == ()
    for step in steps[10:]:
        assert np.array_equal(again.source.next_step().tokens, step.tokens)
    names = set()
    while (later := again.source.next_step()).progress.position.epoch == 0:
        names.add(later.progress.position.file_name)
    again.source.close()
    assert "000_00010.parquet" in names


def test_another_tokenizer_or_column_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    corpus.write_shards(tmp_path, corpus.short_texts(10, 100))
    options = options_for(tmp_path)
    source = open_stream(options, tokenizer)
    progress = source.source.next_step().progress
    source.source.close()
    other = load_tokenizer(str(corpus.build_tokenizer(tmp_path / "tokenizer", vocab_size=400)))
    with pytest.raises(
        DataError, match=r"the tokenizer \(--tokenizer-path\) was [0-9a-f]{32}, is [0-9a-f]{32}"
    ):
        resume(source, progress, options, other)


def test_the_manifest_of_thousands_is_compact(tmp_path: Path) -> None:
    corpus.write_shards(tmp_path, corpus.short_texts(9, 50))
    shards = open_corpus(str(tmp_path), "text")
    many = [replace(shards[0], name=f"000_{index:05d}.parquet") for index in range(5000)]
    saved = json.loads(json.dumps(manifest(many)))
    assert len(json.dumps(saved)) < 110 * 5000
    assert manifest_difference(saved, many) == ""
    assert "removed: 000_00003.parquet" in manifest_difference(saved, many[:3] + many[4:])


def counting(function: Callable[..., Any], calls: list[Path]) -> Callable[..., Any]:
    def wrapper(path: Path, *args: Any) -> Any:
        calls.append(path)
        return function(path, *args)

    return wrapper


def test_footers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = corpus.write_shards(tmp_path, corpus.short_texts(9, 50))
    calls: list[Path] = []
    monkeypatch.setattr(data_shards, "read_footer", counting(data_formats.read_footer, calls))
    first = open_corpus(str(tmp_path), "text", cache_dir=tmp_path / "cache")
    assert len(calls) == 3
    assert open_corpus(str(tmp_path), "text", cache_dir=tmp_path / "cache") == first and len(calls) == 3
    os.utime(paths[1], ns=(1, 1))
    open_corpus(str(tmp_path), "text", cache_dir=tmp_path / "cache")
    assert calls[3:] == [paths[1]]
    with pytest.raises(DataError, match="no column 'id2'"):  # another column is another question
        open_corpus(str(tmp_path), "id2", cache_dir=tmp_path / "cache")
    for broken in [
        "{broken",
        "[]",
        '{"version": 1, "column": "text"}',
        index_with([1, 2, "x", ["3"]], paths),
    ]:
        (tmp_path / "cache" / "shard_index.json").write_text(broken)
        again = open_corpus(str(tmp_path), "text", cache_dir=tmp_path / "cache")
        assert [shard.digest for shard in again] == [shard.digest for shard in first]


def index_with(entry: list[Any], paths: list[Path]) -> str:
    return json.dumps({"version": 3, "column": "text", "shards": {str(path): entry for path in paths}})


def test_a_resume_reads_nothing_before_its_row_group(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write_shards(tmp_path, corpus.short_texts(200, 300), shards=20, row_group_rows=2)
    options = options_for(tmp_path, cache_dir=tmp_path / "cache")
    source = open_stream(options, tokenizer)
    while (step := source.source.next_step()).progress.position.file_index < 18:
        pass
    source.source.close()
    opened: list[str] = []
    groups: list[int] = []

    def watched_open(path: Path, column: str) -> ShardReader:
        opened.append(path.name)
        return open_shard(path, column)

    def watched_batches(self: ParquetReader, group: int) -> Iterator[TextBatch]:
        groups.append(group)
        return read_batches(self, group)

    read_batches = ParquetReader.batches
    monkeypatch.setattr(data_formats, "open_shard", watched_open)  # footers: from the index
    monkeypatch.setattr(documents, "open_shard", watched_open)
    monkeypatch.setattr(ParquetReader, "batches", watched_batches)
    again = resume(source, step.progress, options, tokenizer)
    assert opened == []
    again.source.next_step()
    again.source.close()
    assert opened[:2] == ["000_00018.parquet", "000_00019.parquet"]
    assert groups[0] == step.progress.position.row // 2
