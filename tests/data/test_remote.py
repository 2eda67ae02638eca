"""Shards at URLs: the same stream as from a folder, little traffic, bounded retries, errors by name."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import argonne.data.http_store as http_store
import argonne.data.retries as retries
from argonne.data.range_cache import BLOCK_BYTES, RangeCache
from argonne.data.shards import find_shards, open_corpus
from argonne.data.tokenizer import load_tokenizer
from argonne.errors import DataError
from argonne.testing.corpus import build_tokenizer, short_texts, write_shards
from data_stream import SourceOptions, open_stream
from tests.data.remote_server import Faults, serving
from tests.data.shard_samples import options_for, resume
from tests.data.token_samples import write_flat

TEXTS = [*short_texts(60, 200), None, ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(build_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "site" / "data", TEXTS, shards=11)
    return tmp_path / "site"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    monkeypatch.setattr(retries, "PAUSES", (0.01, 0.01, 0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(folder) as found:
        yield found


def in_memory(folder: Path) -> str:
    files = fsspec.filesystem("memory")
    if files.exists("/corpus"):
        files.rm("/corpus", recursive=True)
    for path in (folder / "data").iterdir():
        files.pipe(f"/corpus/{path.name}", path.read_bytes())
    return "memory://corpus/*.parquet"


def same_stream(options: SourceOptions, local: SourceOptions, tokenizer: Any, steps: int = 30) -> None:
    one, other = open_stream(options, tokenizer), open_stream(local, tokenizer)
    for number in range(steps):
        step, same = one.source.next_step(), other.source.next_step()
        assert (step.tokens == same.tokens).all()
        assert step.progress == same.progress
        if number == 7:
            again = resume(one, step.progress, options, tokenizer)
            resumed = again.source.next_step()
            again.source.close()
        if number == 8:
            assert (resumed.tokens == step.tokens).all()
            assert resumed.progress.stream_hash == step.progress.stream_hash
    one.source.close()
    other.source.close()


def test_the_stream_is_that_of_the_folder(folder: Path, server: Any, tokenizer: Any) -> None:
    """In natural order, resumed in the middle, by pattern over HTTP and in fsspec's memory."""
    for glob, same in [
        (f"{server[0]}/data/*.parquet", f"{folder}/data/*.parquet"),
        (f"{server[0]}/d*/000_*.parquet", f"{folder}/d*/000_*.parquet"),
        (in_memory(folder), f"{folder}/data/*.parquet"),
    ]:
        assert [found.name for found in find_shards(glob)] == [found.name for found in find_shards(same)]
        same_stream(options_for(folder, data_glob=glob), options_for(folder, data_glob=same), tokenizer)


def test_single_urls_and_empty_patterns(folder: Path, server: Any) -> None:
    url, _ = server
    assert [str(found.path) for found in find_shards(f"{url}/data/000_00003.parquet?download=true")] == [
        f"{url}/data/000_00003.parquet?download=true"
    ]
    (shard,) = open_corpus(f"{url}/data/000_00003.parquet?download=true", "text")
    assert shard.name == "000_00003.parquet" and shard.rows > 0
    for glob in (f"{url}/data/*.json", "memory://nothing/*.parquet"):
        with pytest.raises(DataError, match=r"no shard matches .*--data-glob"):
            find_shards(glob)


def test_flat_and_arrow_shards_are_read_too(folder: Path, server: Any, tokenizer: Any) -> None:
    import pyarrow as pa

    ids = np.arange(5000) % len(tokenizer)
    write_flat(folder / "flat" / "a.bin", ids)
    flat = options_for(folder, data_glob=f"{server[0]}/flat/*.bin")
    same_stream(flat, options_for(folder, data_glob=f"{folder}/flat/*.bin"), tokenizer)
    table = pa.table({"text": [text for text in TEXTS if text]})
    (folder / "arrow").mkdir()
    with pa.ipc.new_file(folder / "arrow" / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    arrow = options_for(folder, data_glob=f"{server[0]}/arrow/*.arrow")
    same_stream(arrow, options_for(folder, data_glob=f"{folder}/arrow/*.arrow"), tokenizer)


def test_only_footers_and_row_groups_travel(
    tmp_path: Path, server: Any, folder: Path, tokenizer: Any
) -> None:
    """Of a shard of many row groups a start reads the end; a step, the row groups that it needs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    url, faults = server
    generator = np.random.default_rng(0)
    texts = ["".join(chr(c) for c in generator.integers(33, 126, 40_000)) for _ in range(60)]
    extra = [generator.bytes(40_000) for _ in texts]
    (folder / "big").mkdir()
    path = folder / "big" / "a.parquet"
    pq.write_table(pa.table({"extra": extra, "text": texts}), path, row_group_size=2)
    size = path.stat().st_size
    assert size > 4_000_000
    options = options_for(folder, data_glob=f"{url}/big/a.parquet", block_size=64)
    opened = open_stream(options, tokenizer)
    assert faults.served["a.parquet"] < 300_000
    opened.source.close()
    position = {"file_name": "a.parquet", "row": 40, "token_offset": 0, "streaming": True}
    before = faults.served["a.parquet"]
    source = open_stream(options, tokenizer, saved_position=position, global_step=1).source
    source.next_step()
    source.close()
    # The reader is ahead by what the tokenizing workers hold; the column beside the text stays where it is.
    assert faults.served["a.parquet"] - before < 2_000_000


@pytest.mark.parametrize("statuses", [[503], [500, 502, 429], [503] * 4])
def test_what_passes_is_asked_again(statuses: list[int], server: Any, folder: Path, tokenizer: Any) -> None:
    url, faults = server
    opened = open_stream(options_for(folder, data_glob=f"{url}/data/*.parquet"), tokenizer)
    faults.statuses = statuses
    expected = open_stream(options_for(folder / "data"), tokenizer).source
    for _ in range(10):
        assert (opened.source.next_step().tokens == expected.next_step().tokens).all()
    assert not faults.statuses


@pytest.mark.parametrize(
    ("status", "said", "requests"),
    [(503, r"HTTP 503 .*\(5 attempts\)", 5), (404, "not there", 1), (403, "refused it: HTTP 403", 1)],
)
def test_what_stays_is_said_with_shard_and_cause(
    status: int, said: str, requests: int, server: Any, folder: Path, tokenizer: Any
) -> None:
    url, faults = server
    faults.statuses = [status] * 1000
    glob = f"{url}/data/000_00002.parquet"
    with pytest.raises(DataError, match=f"000_00002.parquet: .*{said}"):
        open_corpus(glob, "text")
    assert faults.requests == requests
    faults.statuses = []
    source = open_stream(options_for(folder, data_glob=glob), tokenizer).source
    faults.statuses = [status] * 1000
    with pytest.raises(DataError, match=f"cannot read {glob}.*: .*{said}.*--skip-bad-shards"):
        for _ in range(100):
            source.next_step()


def test_an_answer_that_is_cut_is_asked_again(server: Any, folder: Path, tokenizer: Any) -> None:
    url, faults = server
    faults.cut_after, faults.cuts = 100, 3
    same_stream(
        options_for(folder, data_glob=f"{url}/data/*.parquet"), options_for(folder / "data"), tokenizer
    )
    assert faults.cuts == 0
    faults.cuts = 10_000
    with pytest.raises(DataError, match=r"000_00002.parquet: the answer was cut: 100 of .*\(5 attempts\)"):
        open_corpus(f"{url}/data/000_00002.parquet", "text")


def test_a_slow_server_is_given_up(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, faults = server
    monkeypatch.setattr(http_store, "SOCKET_SECONDS", 0.2)
    faults.stall_seconds = 5.0
    with pytest.raises(DataError, match=r"000_00002.parquet: .*timed out.*\(5 attempts\)"):
        open_corpus(f"{url}/data/000_00002.parquet", "text")


def test_a_server_that_is_gone_and_one_without_ranges(server: Any) -> None:
    url, faults = server
    with pytest.raises(DataError, match=r"cannot list .*--data-glob.*refused"):
        find_shards("http://127.0.0.1:9/data/*.parquet")
    faults.ranges = False
    with pytest.raises(DataError, match=r"000_00002.parquet: the server does not answer range requests"):
        open_corpus(f"{url}/data/000_00002.parquet", "text")


def test_a_shard_that_goes_is_skipped_where_asked(server: Any, folder: Path, tokenizer: Any) -> None:
    url, _ = server
    options = options_for(folder, data_glob=f"{url}/data/*.parquet", skip_bad_shards=True)
    source = open_stream(options, tokenizer).source
    (folder / "data" / "000_00005.parquet").unlink()
    while (step := source.next_step()).progress.position.epoch == 0:
        pass
    (skip,) = [one for one in step.progress.skipped if one["epoch"] == 0]
    assert skip["file_name"] == "000_00005.parquet" and skip["reason"] == "it is not there (HTTP 404)"


@pytest.mark.parametrize("kind", ["http", "memory"])
def test_a_shard_changed_under_its_name_is_noticed(
    kind: str, server: Any, folder: Path, tokenizer: Any
) -> None:
    """While the run goes on, and at a resume, as with files."""
    glob = f"{server[0]}/data/*.parquet" if kind == "http" else in_memory(folder)
    options = options_for(folder, data_glob=glob)
    opened = open_stream(options, tokenizer)
    progress = opened.source.next_step().progress
    write_shards(folder / "other", [text[::-1] if text else text for text in TEXTS], shards=11)
    content = (folder / "other" / "000_00009.parquet").read_bytes()
    (folder / "data" / "000_00009.parquet").write_bytes(content)
    fsspec.filesystem("memory").pipe("/corpus/000_00009.parquet", content)
    with pytest.raises(DataError, match=r"000_00009.parquet: it was rewritten since the run started"):
        for _ in range(1000):
            opened.source.next_step()
    with pytest.raises(DataError, match=r"shards rewritten: 000_00009.parquet"):
        resume(opened, progress, options, tokenizer)


def test_a_cache_folder_spares_the_second_epoch(
    server: Any, folder: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = server
    monkeypatch.setattr("argonne.data.documents.KEPT_COST", 0)
    options = options_for(folder, data_glob=f"{url}/data/*.parquet", remote_cache=tmp_path / "cache")
    source = open_stream(options, tokenizer).source
    while (step := source.next_step()).progress.position.epoch == 0:
        pass
    first = sum(faults.served.values())
    while step.progress.position.epoch < 3:
        step = source.next_step()
    again = open_stream(options, tokenizer).source
    again.next_step()
    assert sum(faults.served.values()) - first < 0.1 * first, "only sizes are asked again"
    source.close()
    again.close()
    shutil.rmtree(tmp_path / "cache")
    same_stream(options, options_for(folder / "data"), tokenizer)


def test_the_cache_gives_the_file_in_any_order(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(5 * BLOCK_BYTES + 77)
    fetched: list[tuple[int, int]] = []

    def fetch(start: int, end: int) -> bytes:
        fetched.append((start, end))
        return content[start:end]

    generator = np.random.default_rng(1)
    for _ in range(3):
        cache = RangeCache(tmp_path / "one", len(content), fetch)
        for _ in range(40):
            start, end = sorted(generator.integers(0, len(content) + 1, 2).tolist())
            assert cache.read(start, end) == content[start:end]
    assert sum(end - start for start, end in fetched) <= 2 * len(content)
    (tmp_path / "file").write_text("")
    closed = RangeCache(tmp_path / "file" / "two", len(content), fetch)
    assert closed.read(5, 500) == content[5:500]


@pytest.mark.parametrize(("glob", "said"), [("s3://b/*.parquet", "pip install s3fs"), ("gs://b/*", "gcsfs")])
def test_a_missing_package_is_named(glob: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(DataError, match=said):
        find_shards(glob)
    with pytest.raises(DataError, match="fsspec does not know nonsense://"):
        find_shards("nonsense://x/*.parquet")
