"""Order, start-up check and identity of the shards; rows that are skipped, replaced or unreadable."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_formats
import data_shards
import data_stream
from data_formats import open_shard
from data_open import OpenedSource, open_source
from data_shards import find_shards, manifest, manifest_difference, natural_key, open_corpus, shard_names
from data_source import DataProgress, SourceOptions
from data_tokenize import load_tokenizer
from run_errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(corpus.build_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def options_for(folder: Path, **changes: Any) -> SourceOptions:
    options = SourceOptions(data_glob=f"{folder}/*.parquet", block_size=8, samples_per_step=2, num_proc=1)
    return replace(options, **changes)


def texts_of(folder: Path, tokenizer: Any, steps: int = 1, **changes: Any) -> tuple[str, DataProgress]:
    """The decoded input tokens of the first steps."""
    source = open_source(options_for(folder, **changes), tokenizer).source
    tokens = []
    for _ in range(steps):
        step = source.next_step()
        tokens.extend(step.tokens[:, :-1].ravel().tolist())
    source.close()
    return tokenizer.decode(tokens), step.progress


def write_column(path: Path, values: Any, type_: pa.DataType | None = None, name: str = "text") -> Path:
    pq.write_table(pa.table({name: pa.array(values, type_), "id": pa.array(range(len(values)))}), path)
    return path


def text_array(values: list[bytes | None]) -> pa.Array:
    """A string array whose bytes nobody checked."""
    return pa.array(values, pa.binary()).view(pa.string())


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
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "x/s_9.parquet",
        "y/s_9.parquet",
        "x/s_10.parquet",
    ]
    assert shard_names(found) == ["x/s_9.parquet", "y/s_9.parquet", "s_10.parquet"]
    assert find_shards(str(tmp_path / "y")) == [tmp_path / "y/s_9.parquet"]
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
    write_column(tmp_path / "s_7.parquet", [None], pa.null())
    write_column(tmp_path / "s_8.parquet", [b"bytes"])
    with pytest.raises(DataError) as caught:
        open_corpus(f"{tmp_path}/*.parquet")
    message = str(caught.value)
    assert "\n" not in message and "8 of 9 shards" in message and "s_0.parquet" not in message
    for part in [
        "s_1.parquet: 0 bytes",
        "s_2.parquet: ",
        "s_3.parquet: ",
        "s_4.parquet: no column 'text' (columns: content: string, id: int64)",
        "s_5.parquet: column 'text' is int64",
        "s_6.parquet: column 'text' is list<",
        "s_7.parquet: column 'text' holds only nulls",
        "s_8.parquet: column 'text' is binary",
        "--skip-bad-shards",
    ]:
        assert part in message, part
    shards = open_corpus(f"{tmp_path}/*.parquet", skip_bad_shards=True)
    assert [bool(shard.fault) for shard in shards] == [False] + [True] * 8


def test_a_shard_of_nulls_is_passed_over_with_a_warning(tmp_path: Path, tokenizer: Any) -> None:
    write_column(tmp_path / "a.parquet", ["some text"] * 5)
    write_column(tmp_path / "b.parquet", [None, None], pa.string())
    options = options_for(tmp_path, cache_dir=tmp_path / "cache")
    for _ in range(2):  # from the footers, then from the index
        source = open_source(options, tokenizer)
        assert source.notices == ("without any text in 'text' (--text-column): b.parquet",)
        step = source.source.next_step()
        while step.progress.position.epoch == 0:
            step = source.source.next_step()
        source.source.close()
        assert step.progress.counts.null_rows == 2 and step.progress.skipped == ()


def test_a_missing_column_names_the_flag(tmp_path: Path) -> None:
    write_column(tmp_path / "a.parquet", ["some"], name="content")
    with pytest.raises(DataError, match=r"columns: content: string, id: int64.*--text-column"):
        open_corpus(f"{tmp_path}/*.parquet")
    assert open_corpus(f"{tmp_path}/*.parquet", "content")[0].rows == 1


def test_empty_corpora_are_errors(tmp_path: Path, tokenizer: Any) -> None:
    write_column(tmp_path / "a.parquet", [], pa.string())
    with pytest.raises(DataError, match="hold no row"):
        open_corpus(f"{tmp_path}/*.parquet")
    write_column(tmp_path / "b.parquet", ["", "", None])
    with pytest.raises(DataError, match="hold no text"):
        texts_of(tmp_path, tokenizer)


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
        pq.write_table(table, path, row_group_size=3)
    else:
        path = tmp_path / "a.arrow"
        writer = pa.ipc.new_stream if suffix == "arrow-stream" else pa.ipc.new_file
        with writer(str(path), table.schema) as sink:
            sink.write_table(table.combine_chunks(), max_chunksize=3)
    shard = open_corpus(str(path))[0]
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
        tmp_path / "d", num_shards=2
    )
    shards = open_corpus(f"{tmp_path}/d/*.arrow")
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
    whole = data_formats.to_texts(text_array(values))
    monkeypatch.setattr(data_formats, "LONG_BYTES", 10)
    monkeypatch.setattr(data_formats, "BATCH_BYTES", 3)
    longs = data_formats.to_texts(text_array(values))
    assert sum(isinstance(text, data_formats.LongText) for text in longs.texts) > 100
    assert longs.replaced == whole.replaced
    for value, text in zip(values, longs.texts, strict=True):
        together = "".join(text.stretches()) if isinstance(text, data_formats.LongText) else text
        assert together == (None if value is None else value.decode("utf-8", errors="replace"))


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
    source = open_source(options, tokenizer)
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


def resume(
    source: OpenedSource, progress: DataProgress, options: SourceOptions, tokenizer: Any
) -> OpenedSource:
    saved = json.loads(json.dumps([source.position_dict(progress), source.state_dict(progress)]))
    return open_source(options, tokenizer, saved_position=saved[0], saved_state=saved[1], global_step=1)


@pytest.mark.parametrize("damage", ["deleted", "rewritten", "cut"])
def test_a_shard_that_goes_bad_in_the_middle(tmp_path: Path, tokenizer: Any, damage: str) -> None:
    texts = corpus.short_texts(30, 600)
    paths = corpus.write_shards(tmp_path, texts, shards=3)
    for skip in (False, True):
        corpus.write_shards(tmp_path, texts, shards=3)
        source = open_source(options_for(tmp_path, skip_bad_shards=skip), tokenizer).source
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
    source = open_source(options, tokenizer).source
    os.utime(paths[1], ns=(1, 1))
    while source.next_step().progress.position.epoch == 0:
        pass
    source.close()
    source, size = open_source(options, tokenizer).source, paths[1].stat().st_size
    write_column(paths[1], [f"wor {1}{j}" for j in range(9)])
    assert paths[1].stat().st_size == size
    with pytest.raises(DataError, match=r"1\.parquet: it was rewritten since the run started"):
        while source.next_step().progress.position.epoch == 0:
            pass
    source.close()


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
    script = READ_DAMAGED.format(root=str(Path(__file__).resolve().parent.parent), path=str(path))
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
from data_formats import ShardError, open_shard, read_footer

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
        with pytest.raises(data_formats.ShardError, match="cut while it was read"):
            next(batches)


def test_bad_shards_from_the_start_keep_their_place(tmp_path: Path, tokenizer: Any) -> None:
    paths = corpus.write_shards(tmp_path, corpus.short_texts(9, 50), shards=3)
    paths[1].write_bytes(b"PAR1")
    source = open_source(options_for(tmp_path, skip_bad_shards=True), tokenizer)
    assert len(source.notices) == 1 and "000_00001.parquet" in source.notices[0]
    while (step := source.source.next_step()).progress.position.file_index == 0:
        pass
    source.source.close()
    assert step.progress.position.file_name == "000_00002.parquet" and step.progress.position.file_index == 2
    assert step.progress.skipped[0]["file_name"] == "000_00001.parquet"


# the file list is part of the position


def changed(folder: Path, change: str) -> None:
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
    source = open_source(options, tokenizer)
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
    source = open_source(options, tokenizer)
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
    source = open_source(options, tokenizer)
    progress = source.source.next_step().progress
    source.source.close()
    other = load_tokenizer(str(corpus.build_tokenizer(tmp_path / "tokenizer", vocab_size=400)))
    with pytest.raises(
        DataError, match=r"the tokenizer \(--tokenizer-path\) was [0-9a-f]{32}, is [0-9a-f]{32}"
    ):
        resume(source, progress, options, other)


def test_the_manifest_of_thousands_is_compact(tmp_path: Path) -> None:
    corpus.write_shards(tmp_path, corpus.short_texts(9, 50))
    shards = open_corpus(str(tmp_path))
    many = [replace(shards[0], name=f"000_{index:05d}.parquet") for index in range(5000)]
    saved = json.loads(json.dumps(manifest(many)))
    assert len(json.dumps(saved)) < 60 * 5000
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
    first = open_corpus(str(tmp_path), cache_dir=tmp_path / "cache")
    assert len(calls) == 3
    assert open_corpus(str(tmp_path), cache_dir=tmp_path / "cache") == first and len(calls) == 3
    os.utime(paths[1], ns=(1, 1))
    open_corpus(str(tmp_path), cache_dir=tmp_path / "cache")
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
        again = open_corpus(str(tmp_path), cache_dir=tmp_path / "cache")
        assert [shard.digest for shard in again] == [shard.digest for shard in first]


def index_with(entry: list[Any], paths: list[Path]) -> str:
    return json.dumps({"version": 2, "column": "text", "shards": {str(path): entry for path in paths}})


def test_a_resume_reads_nothing_before_its_row_group(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write_shards(tmp_path, corpus.short_texts(200, 300), shards=20, row_group_rows=2)
    options = options_for(tmp_path, cache_dir=tmp_path / "cache")
    source = open_source(options, tokenizer)
    while (step := source.source.next_step()).progress.position.file_index < 18:
        pass
    source.source.close()
    opened: list[str] = []
    groups: list[int] = []

    def watched_open(path: Path, column: str) -> data_formats.ParquetReader | data_formats.ArrowReader:
        opened.append(path.name)
        return open_shard(path, column)

    def watched_batches(self: data_formats.ParquetReader, group: int) -> Iterator[data_formats.TextBatch]:
        groups.append(group)
        return read_batches(self, group)

    read_batches = data_formats.ParquetReader.batches
    monkeypatch.setattr(data_formats, "open_shard", watched_open)  # footers: from the index
    monkeypatch.setattr(data_stream, "open_shard", watched_open)
    monkeypatch.setattr(data_formats.ParquetReader, "batches", watched_batches)
    again = resume(source, step.progress, options, tokenizer)
    assert opened == []
    again.source.next_step()
    again.source.close()
    assert opened[:2] == ["000_00018.parquet", "000_00019.parquet"]
    assert groups[0] == step.progress.position.row // 2
