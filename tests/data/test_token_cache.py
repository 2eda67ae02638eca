"""--no-streaming: one pass of the packed stream, in a seeded order, cached on disk."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tqdm

import argonne.data.stream as data_stream
import argonne.data.token_cache as data_cache
import argonne.testing.corpus as corpus
from argonne.data.source import SourceOptions, SourceStep
from argonne.data.stream import EncodedBatch
from argonne.data.tokenizer import load_tokenizer
from argonne.errors import DataError
from argonne.testing.sources import source_options
from data_stream import OpenedStream, open_stream
from tests.data.shard_samples import resume


@pytest.fixture
def options(tmp_path: Path) -> SourceOptions:
    corpus.write_shards(tmp_path / "data", [None, *corpus.short_texts(50, 300), ""], shards=3)
    return source_options(
        f"{tmp_path}/data/*.parquet",
        block_size=16,
        samples_per_step=5,
        streaming=False,
        num_proc=2,
        seed=7,
        cache_dir=tmp_path / "cache",
    )


def documents(options: SourceOptions, tokenizer: Any) -> list[list[int]]:
    folder = Path(str(options.data_glob)).parent
    texts = [text for path in sorted(folder.iterdir()) for text in pq.read_table(path)["text"].to_pylist()]
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts if text]


def expected_samples(options: SourceOptions, tokenizer: Any, epochs: int) -> np.ndarray:
    size = options.block_size
    if options.packing:
        flat = np.array([token for ids in documents(options, tokenizer) for token in ids])
        blocks = [flat[start : start + size + 1] for start in range(0, len(flat) - size, size)]
    else:
        blocks = [
            np.array(ids[start : start + size + 1])
            for ids in documents(options, tokenizer)
            for start in range(0, len(ids) - size, size)
        ]
    orders = [
        np.random.Generator(np.random.Philox(key=[options.seed, epoch])).permutation(len(blocks))
        for epoch in range(epochs)
    ]
    return np.stack([blocks[index] for order in orders for index in order])


def steps(source: OpenedStream, count: int) -> list[SourceStep]:
    taken = [source.source.next_step() for _ in range(count)]
    source.source.close()
    return taken


@pytest.mark.parametrize("packing", [True, False])
def test_samples_follow_the_permutation(options: SourceOptions, tokenizer: Any, packing: bool) -> None:
    options = replace(options, packing=packing)
    expected = expected_samples(options, tokenizer, 3)
    source = open_stream(options, tokenizer)
    taken = steps(source, 2 * len(expected) // 15 + 3)
    for index, step in enumerate(taken):
        assert step.tokens.dtype == np.int32
        assert np.array_equal(step.tokens, expected[5 * index : 5 * index + 5])
        samples = len(expected) // 3
        position = step.progress.position
        assert (position.epoch, position.sample) == divmod(5 * index + 5, samples)
    for index in range(0, len(taken) - 1, 9):
        (step,) = steps(resume(source, taken[index].progress, options, tokenizer), 1)
        assert np.array_equal(step.tokens, taken[index + 1].tokens)
        assert step.progress == taken[index + 1].progress


def test_a_pipeline_position_goes_on_in_our_order_with_one_warning(
    options: SourceOptions, tokenizer: Any
) -> None:
    saved = {"streaming": False, "current_position": 12, "epoch": 0, "current_file_idx": 0}
    source = open_stream(options, tokenizer, saved_position=saved, global_step=3)
    assert len(source.notices) == 1 and "order" in source.notices[0]
    expected = expected_samples(options, tokenizer, 1)
    assert np.array_equal(steps(source, 1)[0].tokens, expected[12:17])


def test_what_makes_the_place_meaningless_is_refused(options: SourceOptions, tokenizer: Any) -> None:
    source = open_stream(options, tokenizer)
    progress = steps(source, 1)[0].progress
    for change, message in [
        ({"seed": 8}, "--seed was 7, is 8"),
        ({"block_size": 8}, "--block-size was 16, is 8"),
        ({"packing": False}, "packing .* was True, is False"),
        ({"streaming": True}, "streaming .* was False, is True"),
    ]:
        with pytest.raises(DataError, match=message):
            resume(source, progress, replace(options, **change), tokenizer)  # type: ignore[arg-type]


def test_an_appended_shard_stops_the_shuffled_order(
    options: SourceOptions, tokenizer: Any, tmp_path: Path
) -> None:
    source = open_stream(options, tokenizer)
    progress = steps(source, 1)[0].progress
    shard = tmp_path / "data" / "000_00001.parquet"
    (tmp_path / "data" / "000_00009.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(DataError, match=r"added at the end.*4 shards now: .*--allow-data-change"):
        resume(source, progress, options, tokenizer)


def builds(options: SourceOptions) -> list[str]:
    assert options.cache_dir is not None
    return sorted(path.name for path in options.cache_dir.glob("tokens-*"))


def test_the_cache_is_built_once_and_again_when_anything_changed(
    options: SourceOptions, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = steps(open_stream(options, tokenizer), 1)[0].tokens
    (name,) = builds(options)

    with monkeypatch.context() as patch:
        patch.setattr(data_cache, "EncoderPool", None)  # building would fail
        assert np.array_equal(steps(open_stream(options, tokenizer), 1)[0].tokens, first)
        steps(
            open_stream(replace(options, block_size=9, seed=1), tokenizer), 1
        )  # the tokens do not depend on these
    assert builds(options) == [name]
    other = load_tokenizer(str(corpus.build_tokenizer(tmp_path / "other", 400)))
    steps(open_stream(options, other), 1)
    assert len(builds(options)) == 2
    shard = tmp_path / "data" / "000_00001.parquet"
    pq.write_table(pq.read_table(shard).slice(1), shard)
    expected = expected_samples(options, tokenizer, 1)
    assert np.array_equal(steps(open_stream(options, tokenizer), 1)[0].tokens, expected[:5])
    assert len(builds(options)) == 3
    os.utime(shard, ns=(1, 1))
    steps(open_stream(options, tokenizer), 1)
    assert len(builds(options)) == 4


def test_a_build_shows_how_far_it_is(
    options: SourceOptions, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows, those without text included, from nothing to all of them."""
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 500)
    shown: list[tuple[float, float | None]] = []

    class Bar(tqdm.tqdm):
        def __init__(self, **flags: Any) -> None:
            super().__init__(**(flags | {"disable": False, "file": io.StringIO()}))

        def update(self, n: float | None = 1) -> bool | None:
            moved = super().update(n)
            shown.append((self.n, self.total))
            return moved

    monkeypatch.setattr(data_cache, "tqdm", Bar)
    steps(open_stream(options, tokenizer), 1)
    assert len(shown) > 10 and {total for _, total in shown} == {52}
    assert [rows for rows, _ in shown] == sorted(rows for rows, _ in shown) and shown[-1][0] == 52


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("garbage", [b"", b"not yet vouched for"])
def test_an_interrupted_build_goes_on(
    options: SourceOptions, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, garbage: bytes
) -> None:
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(data_cache, "JOURNAL_SECONDS", 0)
    whole = data_cache.encoded_documents
    seen: list[int] = []

    def cut(batches: Iterator[EncodedBatch], limit: int) -> Iterator[EncodedBatch]:
        for number, batch in enumerate(batches):
            if number == limit:
                raise Interrupted
            seen.append(batch.beginnings[0][2][2] if batch.beginnings else -1)
            yield batch

    for limit in (5, 6, 7):
        monkeypatch.setattr(data_cache, "encoded_documents", lambda d, p, n=limit: cut(whole(d, p), n))
        with pytest.raises(Interrupted):
            steps(open_stream(options, tokenizer), 1)
        (folder,) = (tmp_path / "cache").glob("tokens-*")
        for name in ("tokens.bin", "starts.bin"):
            with open(folder / name, "ab") as file:
                file.write(garbage)
    begun = len(seen)
    monkeypatch.setattr(data_cache, "encoded_documents", lambda d, p: cut(whole(d, p), 10**9))
    expected = expected_samples(options, tokenizer, 1)
    taken = steps(open_stream(options, tokenizer), len(expected) // 5)
    assert {path.name for path in folder.iterdir()} == {
        "tokens.bin",
        "starts.bin",
        "rows.bin",
        "meta.json",
        "lock",
    }
    assert len(seen) - begun < begun  # it did not begin anew
    assert np.array_equal(np.concatenate([step.tokens for step in taken]), expected[: 5 * len(taken)])
    assert taken[0].progress.counts.null_rows == 1 and taken[0].progress.counts.documents == 50
    lengths = [len(ids) for ids in documents(options, tokenizer)]
    assert np.fromfile(folder / "starts.bin", np.int64).tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]


def test_a_journal_that_promises_more_than_there_is_counts_for_nothing(
    options: SourceOptions, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(data_cache, "JOURNAL_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(data_cache, "_mapped", lambda folder: 1 / 0)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # keep the journal of the finished build
        with pytest.raises(ZeroDivisionError):
            steps(open_stream(options, tokenizer), 1)
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    assert json.loads((folder / "journal.json").read_text())["tokens"] > 1000
    (folder / "meta.json").unlink()
    (folder / "tokens.bin").write_bytes(b"")
    expected = expected_samples(options, tokenizer, 1)
    assert np.array_equal(steps(open_stream(options, tokenizer), 1)[0].tokens, expected[:5])


def test_what_a_build_skipped_is_not_for_a_run_that_skips_nothing(
    options: SourceOptions, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "data" / "000_00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=4, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(table["text"][9].as_py()[:20].encode())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*000_00001\.parquet, row group 2"):
        steps(open_stream(options, tokenizer), 1)
    skipping = replace(options, skip_bad_shards=True)
    progress = steps(open_stream(skipping, tokenizer), 1)[0].progress
    assert [(skip["row_group"], skip["rows"]) for skip in progress.skipped] == [(2, 4)]
    with pytest.raises(DataError, match=r"lacks 1 row groups .*000_00001\.parquet.*--skip-bad-shards"):
        steps(open_stream(options, tokenizer), 1)


def test_a_full_disk_is_one_line(
    options: SourceOptions, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*files: IO[bytes]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_cache, "_synchronize", full)
    source = open_stream(options, tokenizer)
    with pytest.raises(DataError, match=r"cannot keep the token cache in .*No space left.*--no-streaming"):
        source.source.next_step()


def test_a_corpus_smaller_than_a_sample_is_an_error(options: SourceOptions, tokenizer: Any) -> None:
    source = open_stream(replace(options, block_size=10**6), tokenizer)
    with pytest.raises(DataError, match="--block-size"):
        source.source.next_step()
