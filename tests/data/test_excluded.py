"""--exclude-documents: the stream without the listed rows, for every reader, and what a list may say."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import argonne.testing.corpus as corpus
from argonne.data.excluded import list_line, text_hash
from argonne.data.source import SourceOptions
from argonne.errors import DataError
from argonne.testing.sources import source_options
from data_stream import OpenedStream, held_out_options, open_stream, read_held_out, require_listed
from tests.data.excluded_samples import (
    Packed,
    blocks_of,
    ids,
    shuffled_blocks,
    tokens_of,
    windows_of,
    write_list,
)
from tests.data.mixture_samples import Naive, options_of, write_sources
from tests.data.naive import is_held_out, natural_rows, shuffled_rows
from tests.data.token_samples import write_flat

SIZE = 16
LEFT_OUT = [("000_00000.parquet", 0), ("000_00000.parquet", 9), ("000_00001.parquet", 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of some 13 rows, two of them without text."""
    path = tmp_path_factory.mktemp("data")
    texts: list[str | None] = list(corpus.short_texts(38, 200))
    texts[4:4], texts[20:20] = [None], [""]
    corpus.write_shards(path, texts)
    return path


def options(folder: Path, list_file: Path | None, **changes: Any) -> SourceOptions:
    usual = {"block_size": SIZE, "samples_per_step": 3, "exclude": list_file}
    return source_options(folder / "*.parquet", **usual | changes)


def run(opened: OpenedStream, steps: int) -> list[list[int]]:
    taken = [sample for _ in range(steps) for sample in opened.source.next_step().tokens.tolist()]
    opened.source.close()
    return taken


@pytest.mark.parametrize("shuffle", [False, True])
def test_packed_over_epochs(folder: Path, tokenizer: Any, tmp_path: Path, shuffle: bool) -> None:
    def epoch(number: int) -> list[Any]:
        rows = shuffled_rows(folder, 0, number) if shuffle else natural_rows(folder)
        return tokens_of(rows, tokenizer, LEFT_OUT)

    found = options(folder, write_list(tmp_path / "list", LEFT_OUT), shuffle=shuffle)
    steps = 3 * sum(map(len, epoch(0))) // SIZE // 3
    opened = open_stream(found, tokenizer)
    assert run(opened, steps) == Packed(epoch, SIZE).take(3 * steps)


def test_what_is_passed_over_is_counted(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    opened = open_stream(options(folder, write_list(tmp_path / "list", LEFT_OUT)), tokenizer)
    total = sum(map(len, tokens_of(natural_rows(folder), tokenizer, LEFT_OUT)))
    counts = opened.source.next_step().progress.counts
    assert counts.excluded_rows == 1
    for _ in range(total // SIZE // 3 + 1):
        counts = opened.source.next_step().progress.counts
    opened.source.close()
    assert counts.excluded_rows == len(LEFT_OUT) + 1  # the first again, in the second epoch
    assert (counts.null_rows, counts.empty_rows) == (1, 1)


@pytest.mark.parametrize("streaming", [True, False])
def test_each_document_alone(folder: Path, tokenizer: Any, tmp_path: Path, streaming: bool) -> None:
    windows = [
        window
        for document in tokens_of(natural_rows(folder), tokenizer, LEFT_OUT)
        for window in windows_of(document, SIZE)
    ]
    changes = {"packing": False, "streaming": streaming, "cache_dir": tmp_path / "cache"}
    found = options(folder, write_list(tmp_path / "list", LEFT_OUT), **changes)
    expected = [ids(window) for window in windows * 2]
    if not streaming:
        expected = [ids(window) for _, window in islice(shuffled_blocks(windows, 0), 2 * len(windows))]
    steps = len(windows) // 3 + 2
    assert run(open_stream(found, tokenizer), steps) == expected[: 3 * steps]


def test_the_token_cache_is_another_one(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    blocks = blocks_of(tokens_of(natural_rows(folder), tokenizer, LEFT_OUT), SIZE)
    changes = {"streaming": False, "cache_dir": tmp_path / "cache"}
    whole = run(open_stream(options(folder, None, **changes), tokenizer), 2)
    opened = open_stream(options(folder, write_list(tmp_path / "list", LEFT_OUT), **changes), tokenizer)
    taken = run(opened, len(blocks) // 3 + 2)
    expected = [ids(block) for _, block in islice(shuffled_blocks(blocks, 0), len(taken))]
    assert taken == expected and whole != taken[: len(whole)]
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 2


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_token_columns(folder: Path, tokenizer: Any, tmp_path: Path, suffix: str) -> None:
    documents = tokens_of(natural_rows(folder), tokenizer)
    table = pa.table({"ids": pa.array([ids(document) for document in documents], pa.list_(pa.int32()))})
    path = tmp_path / f"tokens.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=5)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    listed = [2, 17]
    kept = [document for number, document in enumerate(documents) if number not in listed]
    lines = [list_line("", path.name, row, None) for row in listed]
    (tmp_path / "list").write_text("\n".join(lines))
    found = replace(options(tmp_path, tmp_path / "list", token_column="ids"), data_glob=str(path))
    assert run(open_stream(found, tokenizer), 20) == Packed(lambda _: kept, SIZE).take(60)


def test_a_mixture_leaves_out_rows_of_the_source_that_is_named(tokenizer: Any, tmp_path: Path) -> None:
    folders = write_sources(tmp_path)
    shard = "000_00000.parquet"
    write_list(tmp_path / "list", [(shard, 1), (shard, 2)], source="code")
    naive = Naive(folders, tokenizer, {"web": "0.62", "code": "0.3", "books": "0.08"})
    documents = tokens_of(natural_rows(folders["code"]), tokenizer, [(shard, 1), (shard, 2)])
    code = Packed(lambda _: documents, 8)
    expected = []
    order, samples = naive.samples(60, 8)
    for name, sample in zip(order, samples, strict=True):
        expected.append(code.take(1)[0] if name == "code" else sample)
    opened = open_stream(options_of(folders, exclude=tmp_path / "list"), tokenizer)
    assert run(opened, 30) == expected
    parts = held_out_options(options_of(folders, exclude=tmp_path / "list", holdout=2))
    for name, count in {"web": 0, "code": 2, "books": 0}.items():
        part = open_stream(parts[name], tokenizer)
        part.source.close()
        assert len(part.exclusion) == count
    write_list(tmp_path / "list", [(shard, 1), (shard, 2)])  # without a name: in every source that has it
    opened = open_stream(options_of(folders, exclude=tmp_path / "list"), tokenizer)
    assert len(opened.exclusion) == 6
    opened.source.close()


def test_held_out_documents_and_validation_sets(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [row for row in natural_rows(folder) if row[2] and is_held_out(row[2], 3)]
    places = [(name, row) for name, row, _ in rows[:2]]
    found = options(folder, write_list(tmp_path / "list", places), holdout=3)
    kept = tokens_of(rows, tokenizer, places)
    held = open_stream(held_out_options(found)[""], tokenizer)
    assert run(held, 4) == Packed(lambda _: kept, SIZE).take(12)
    plain = replace(found, exclude=None)
    sets = [read_held_out("set", str(folder), one, tokenizer, 4).tokens.tolist() for one in (found, plain)]
    assert sets[0] == sets[1]


def test_full_paths_plain_lines_and_hashes(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    text = natural_rows(folder)[9][2]
    assert text is not None
    (tmp_path / "list").write_text(
        f"000_00000.parquet:0\n{list_line('', str(folder / '000_00000.parquet'), 9, text)}\n"
    )
    opened = open_stream(options(folder, tmp_path / "list"), tokenizer)
    opened.source.close()
    assert opened.exclusion.rows == {"": {"000_00000.parquet": [0, 9]}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file": "other.parquet", "row": 1}', "line 1: 'other.parquet' is no shard of the data"),
        (
            '{"file": "000_00000.parquet", "row": 13}',
            "'000_00000.parquet' has 13 rows (from 0), and no row 13",
        ),
        ('{"source": "web", "file": "000_00000.parquet", "row": 1}', "there is no source 'web'"),
        ('{"file": "000_00000.parquet", "line": 1}', "'line' is not understood"),
        ('{"file": "000_00000.parquet", "row": true}', "'row' is not understood"),
        ('{"file": "000_00000.parquet", "row": -1}', "it names no file and row"),
        ('{"file": "000_00000.parquet"', "line 1: "),
        ("some words", "'some words' names no document"),
    ],
)
def test_mistakes_name_the_line(line: str, said: str, folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(line + "\n")
    with pytest.raises(DataError, match="--exclude-documents") as caught:
        open_stream(options(folder, tmp_path / "list"), tokenizer)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_hash_of_another_text_names_both(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    text = natural_rows(folder)[5][2]
    assert text is not None
    (tmp_path / "list").write_text(list_line("", "000_00000.parquet", 9, text))
    with pytest.raises(DataError, match=r"'000_00000\.parquet' row 9") as caught:
        open_stream(options(folder, tmp_path / "list"), tokenizer)
    other = natural_rows(folder)[9][2]
    assert other is not None
    assert text_hash(text) in str(caught.value) and text_hash(other) in str(caught.value)


def test_flat_files_have_no_documents(tokenizer: Any, tmp_path: Path) -> None:
    write_flat(tmp_path / "a.bin", range(400))
    (tmp_path / "list").write_text("a.bin:0\n")
    found = source_options(tmp_path / "*.bin", exclude=tmp_path / "list")
    with pytest.raises(DataError, match=r"line 1: 'a\.bin' is a flat token file, which has no rows"):
        open_stream(found, tokenizer)


def test_nothing_left(tokenizer: Any, tmp_path: Path) -> None:
    corpus.write_shards(tmp_path, ["one", "two"], shards=1)
    (tmp_path / "list").write_text("000_00000.parquet:0\n000_00000.parquet:1\n")
    opened = open_stream(options(tmp_path, tmp_path / "list"), tokenizer)
    with pytest.raises(DataError, match="2 are excluded"):
        run(opened, 1)


def test_over_stages_a_document_must_be_in_the_data_of_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        corpus.write_shards(tmp_path / name, ["a", "b", "c"], shards=1)
        (tmp_path / name / "000_00000.parquet").rename(tmp_path / name / f"{name}.parquet")
    listed = write_list(tmp_path / "list", [("one.parquet", 1), ("two.parquet", 2)])
    stages = [options(tmp_path / name, listed, exclude_elsewhere=True) for name in ("one", "two")]
    require_listed(stages)
    with pytest.raises(DataError, match=r"line 4: 'two\.parquet' is no shard"):
        require_listed(stages[:1])


def test_a_staged_run_passes_over_what_is_elsewhere(tokenizer: Any, tmp_path: Path) -> None:
    corpus.write_shards(tmp_path / "data", ["a", "b", "c"], shards=1)
    listed = write_list(tmp_path / "list", [("000_00000.parquet", 1), ("other.parquet", 2)])
    opened = open_stream(options(tmp_path / "data", listed, exclude_elsewhere=True), tokenizer)
    opened.source.close()
    assert opened.exclusion.rows == {"": {"000_00000.parquet": [1]}}
