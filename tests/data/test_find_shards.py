"""Which files patterns and folders name, what they are called, and what is said otherwise."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.data.find_shards import find_shards
from argonne.data.shards import open_corpus
from argonne.errors import DataError
from data_stream import open_stream
from tests.data.shard_samples import options_for, resume, write_column


def names(*globs: Path | str) -> list[str]:
    return [found.name for found in find_shards([str(one) for one in globs])]


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")


def test_names_stay_when_a_second_folder_comes(tmp_path: Path, tokenizer: Any) -> None:
    for day in (1, 2):
        (tmp_path / f"day={day}").mkdir()
    write_column(tmp_path / "day=1/part.parquet", ["some text"] * 50)
    options = options_for(tmp_path)
    options = replace(options, data_glob=f"{tmp_path}/*/*.parquet")
    source = open_stream(options, tokenizer)
    progress = source.source.next_step().progress
    source.source.close()
    assert progress.position.file_name == "day=1/part.parquet"
    write_column(tmp_path / "day=2/part.parquet", ["other text"] * 50)
    again = resume(source, progress, options, tokenizer)
    again.source.close()
    assert again.notices == () and again.start.position == progress.position
    # A checkpoint of an older version calls the only shard by its base name, its digest is the tail's.
    old_position = source.position_dict(progress) | {"file_name": "part.parquet"}
    old_state = json.loads(json.dumps(source.state_dict(progress)))
    old_state["manifest"]["names"] = ["part.parquet"]
    old_state["manifest"]["digests"] = [digest[:16] for digest in old_state["manifest"]["digests"]]
    del old_state["manifest"]["mtimes"]
    old = open_stream(options, tokenizer, saved_position=old_position, saved_state=old_state, global_step=1)
    old.source.close()
    assert old.notices == () and old.start.position.file_name == "day=1/part.parquet"


def test_system_files_and_caches_never(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.parquet", "._a.parquet", ".a.parquet.crc", "a.parquet.crc", "_SUCCESS", ".git/x.parquet"
    )
    touch(tmp_path, "_delta_log/0.parquet", "cache-0123456789abcdef.arrow")
    assert names(tmp_path) == names(f"{tmp_path}/*") == names(f"{tmp_path}/**/*.parquet") == ["a.parquet"]


def test_links_loops_and_repeats_count_once(tmp_path: Path) -> None:
    touch(tmp_path, "d/a.parquet", "d/e/b.parquet")
    (tmp_path / "d/loop").symlink_to("..")
    (tmp_path / "d/again.parquet").symlink_to("a.parquet")
    pattern = f"{tmp_path}/d/**/*.parquet"
    assert names(pattern) == names(pattern, tmp_path / "d/a.parquet") == ["a.parquet", "e/b.parquet"]
    (tmp_path / "d/gone.parquet").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.parquet: No such file"):
        open_corpus(f"{tmp_path}/d/g*.parquet", "text")


def test_a_path_that_exists_is_taken_literally(tmp_path: Path) -> None:
    touch(tmp_path, "[D]/train[0].parquet", "D/other.parquet")
    assert (
        names(tmp_path / "[D]/train[0].parquet") == names(f"{tmp_path}/[D]/*.parquet") == ["train[0].parquet"]
    )


def test_repeated_globs_add_and_tell_equal_names_apart(tmp_path: Path) -> None:
    touch(tmp_path, "x/0.parquet", "y/0.parquet")
    assert names(tmp_path / "x", tmp_path / "y") == ["0.parquet", "y/0.parquet"]
    with pytest.raises(DataError, match=r"no shard matches '.*nothing'"):
        names(tmp_path / "x", tmp_path / "nothing")


@pytest.mark.parametrize("given", ["", "/*"])
def test_a_folder_of_folders_names_the_pattern_that_works(tmp_path: Path, given: str) -> None:
    touch(tmp_path, "data/1/a.parquet", "data/2/b.parquet")
    with pytest.raises(DataError, match="folders below: give") as caught:
        names(f"{tmp_path}/data{given}")
    pattern = str(caught.value).split("give '")[1].split("'")[0]
    assert len(names(pattern)) == 2


def test_urls_raw_text_and_braces_name_the_remedy(tmp_path: Path) -> None:
    touch(tmp_path, "raw/a.jsonl")
    for given, remedy in [
        ("s3://bucket/*.parquet", "pip install s3fs"),
        ("file:///x.parquet", "give the path alone"),
        (str(tmp_path / "raw"), "scripts/prepare_data.py"),
        (f"{tmp_path}/{{a,b}}.parquet", "once for each"),
    ]:
        with pytest.raises(DataError, match=remedy) as caught:
            names(given)
        assert "--data-glob" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_shard_is_recognized(tmp_path: Path) -> None:
    for name, content in {
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "html": b"\n<!DOCTYPE html><html>",
        "json": b'\xef\xbb\xbf{"text": "a"}\n',
    }.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_corpus(str(tmp_path), "text")
    for part in ("git lfs pull", "an HTML page", "scripts/prepare_data.py"):
        assert part in str(caught.value)


def test_a_name_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    write_column(tmp_path / "a.parquet", ["text"])
    os.rename(tmp_path / "a.parquet", os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    with pytest.raises(DataError, match=r"caf\\xe9.parquet: its path is not UTF-8: rename it"):
        open_corpus(str(tmp_path), "text")


def test_a_datasets_folder_by_its_state(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"text": [f"doc {i}" for i in range(20)]})
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"text": row["text"].upper()})
    for given in (tmp_path / "one", f"{tmp_path}/one/*.arrow", f"{tmp_path}/**/*.arrow"):
        assert sum(shard.rows for shard in open_corpus(str(given), "text")) == 20
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match=r"splits .* give '.*/dict/train'"):
        names(tmp_path / "dict")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_an_edit_that_keeps_size_and_mtime_is_noticed(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    path, table = tmp_path / f"a.{suffix}", pa.table({"text": ["x" * 200_000, "needle", "y" * 200_000]})
    if suffix == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    else:
        with pa.ipc.new_file(str(path), table.schema) as sink:
            sink.write_table(table)
    options = replace(options_for(tmp_path), data_glob=str(path), cache_dir=tmp_path / "cache")
    source = open_stream(options, tokenizer)
    progress = source.source.next_step().progress
    source.source.close()
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"needle", b"noodle"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=f"rewritten: a.{suffix}"):
        resume(source, progress, options, tokenizer)
