"""--shuffle and --holdout: the order from three lines of numpy, resumed anywhere; what stays held out."""

import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import argonne.data.documents as documents
import argonne.data.stream as data_stream
import argonne.testing.corpus as corpus
from argonne.data.holdout import Holdout
from argonne.data.order import ShuffledOrder
from argonne.data.shards import open_corpus
from argonne.data.source import SourceOptions
from argonne.errors import DataError
from argonne.testing.sources import source_options
from data_stream import held_out_options, open_stream
from tests import ROOT
from tests.data.naive import Stream, ids_of, is_held_out, natural_rows, shuffled_rows
from tests.data.shard_samples import resume

SEED = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of row groups of seven rows; some rows are no documents."""
    folder = tmp_path_factory.mktemp("shuffled")
    texts: list[str | None] = list(corpus.short_texts(90, 200))
    texts[3:3] = [None, ""]
    texts[50:50] = ["", None, "x"]
    corpus.write_shards(folder, texts, shards=4)
    return folder


def options_of(folder: Path, **changes: Any) -> SourceOptions:
    return replace(source_options(folder), **({"shuffle": True, "seed": SEED} | changes))


def documented(block: int) -> dict[str, Any]:
    """What a Python block of docs/data.md defines."""
    names: dict[str, Any] = {}
    exec((ROOT / "docs" / "data.md").read_text().split("```python\n")[block].split("```")[0], names)
    return names


def test_the_documented_order(folder: Path) -> None:
    shards = open_corpus(str(folder), "text")
    for epoch in (0, 7):
        found = documented(2)["shuffled"]([shard.group_rows for shard in shards], SEED, epoch)
        rows = [(shards[i].name, shards[i].first_rows[group] + row) for i, group, row in found]
        assert rows == [row[:2] for row in shuffled_rows(folder, SEED, epoch)]


def test_three_lines_of_numpy(folder: Path) -> None:
    shards = open_corpus(str(folder), "text")
    epoch, i = 3, 2
    order = np.random.Generator(np.random.Philox(key=[SEED, (epoch << 32) | i]))
    groups = order.permutation(len(shards[i].group_rows))
    rows = [order.permutation(shards[i].group_rows[group]) for group in groups]
    found = list(ShuffledOrder(SEED).groups(epoch, i, shards[i], None))
    assert [group for group, _ in found] == groups.tolist()
    assert all(np.array_equal(a, b) for (_, a), b in zip(found, rows, strict=True) if a is not None)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("seed", [0, SEED, 2**63 - 1])
def test_tokens_and_places_of_three_epochs(
    folder: Path, tokenizer: Any, seed: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read again each epoch, or repeated from memory: every sample and position as by the definition."""
    monkeypatch.setattr(documents, "KEPT_COST", 1 << 19 if kept else 0)
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 2000)
    naive = Stream(folder, tokenizer, seed)
    options = options_of(folder, seed=seed, block_size=64, samples_per_step=3, num_proc=2)
    source = open_stream(options, tokenizer).source
    for number in itertools.count(step=3):
        step = source.next_step()
        expected = [naive.sample(number + index, 64) for index in range(3)]
        assert step.tokens.tolist() == expected
        place = step.progress.position
        here = (place.epoch, place.file_name, place.row, place.token_offset)
        assert here == naive.places[(number + 3) * 64]
        if place.epoch == 3:
            break
    source.close()
    assert len({tuple(row[:2] for row in shuffled_rows(folder, seed, epoch)) for epoch in range(3)}) == 3


def test_resume_at_every_step(folder: Path, tokenizer: Any) -> None:
    """Through JSON, with another number of workers, across epochs."""
    options = options_of(folder, block_size=50, samples_per_step=4)
    source = open_stream(options, tokenizer)
    unbroken = [source.source.next_step() for _ in range(60)]
    source.source.close()
    assert unbroken[-1].progress.position.epoch >= 1
    for before, after in itertools.pairwise(unbroken):
        again = resume(source, before.progress, replace(options, num_proc=2), tokenizer)
        step = again.source.next_step()
        again.source.close()
        assert np.array_equal(step.tokens, after.tokens) and step.progress == after.progress
        assert again.notices == ()


def test_resuming_reads_one_row_group(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep the place: the first tokens come from the row group that it stands in."""
    read: list[tuple[str, int]] = []
    reading = documents.read_group

    def counted(reader: Any, group: int) -> Any:
        read.append((str(reader._path if hasattr(reader, "_path") else ""), group))
        return reading(reader, group)

    options = options_of(folder, block_size=8, samples_per_step=1)
    source = open_stream(options, tokenizer)
    progress = [source.source.next_step().progress for _ in range(700)][-1]
    source.source.close()
    assert progress.position.epoch == 0 and progress.position.file_index != source.start.position.file_index
    monkeypatch.setattr(documents, "read_group", counted)
    monkeypatch.setattr(data_stream, "BATCH_CHARACTERS", 1)
    monkeypatch.setattr(data_stream, "BATCHES_PER_WORKER", 0)
    again = resume(source, progress, options, tokenizer)
    again.source.next_step()
    again.source.close()
    assert len(read) <= 2


def test_one_row_group_is_in_memory(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a corpus that is too large to be kept: none is left when the next one is read."""
    monkeypatch.setattr(documents, "KEPT_COST", 0)
    reading, most = documents.read_group, 0
    groups: list[weakref.ref[Any]] = []

    def watched(reader: Any, group: int) -> Any:
        nonlocal most
        most = max(most, sum(there() is not None for there in groups))
        found = reading(reader, group)
        groups.append(weakref.ref(found))
        return found

    monkeypatch.setattr(documents, "read_group", watched)
    source = open_stream(options_of(folder, block_size=64, samples_per_step=8), tokenizer).source
    for _ in range(60):
        source.next_step()
    source.close()
    assert len(groups) > 14 and most == 0


def test_another_order_is_refused(folder: Path, tokenizer: Any) -> None:
    """--shuffle on or off, or another seed: an error, or the next epoch by --allow-data-change."""
    plain = options_of(folder, shuffle=False)
    for first, second, named in (
        (options_of(folder), options_of(folder, seed=SEED + 1), "--seed was 11, is 12"),
        (plain, options_of(folder), "--shuffle was False, is True"),
        (options_of(folder), plain, "--shuffle was True, is False"),
    ):
        source = open_stream(first, tokenizer)
        progress = source.source.next_step().progress
        source.source.close()
        with pytest.raises(DataError, match=named):
            resume(source, progress, second, tokenizer)
        again = resume(source, progress, replace(second, allow_data_change=True), tokenizer)
        again.source.close()
        assert again.start.position.epoch == 1 and any("epoch 1 begins" in text for text in again.notices)
        expected = Stream(folder, tokenizer, second.seed) if second.shuffle else None
        if expected is not None:
            rows = shuffled_rows(folder, second.seed, 1)
            assert (again.start.position.file_name, again.start.position.row) == rows[0][:2]
    unshuffled = open_stream(plain, tokenizer)
    progress = unshuffled.source.next_step().progress
    unshuffled.source.close()
    old_state = {k: v for k, v in unshuffled.state_dict(progress).items() if k not in ("shuffle", "holdout")}
    saved = json.loads(json.dumps([unshuffled.position_dict(progress), old_state]))
    before = open_stream(plain, tokenizer, saved_position=saved[0], saved_state=saved[1], global_step=1)
    before.source.close()
    assert before.notices == ()  # a checkpoint from before these flags was not shuffled


def test_a_pipeline_position_begins_the_next_shuffled_epoch(folder: Path, tokenizer: Any) -> None:
    saved = {"streaming": True, "current_file_idx": 1, "position_in_file": 3, "chunk_offset": 0, "epoch": 4}
    opened = open_stream(options_of(folder), tokenizer, saved_position=saved, global_step=9)
    opened.source.close()
    assert opened.start.position.epoch == 5 and len(opened.notices) == 1


def test_a_row_group_that_cannot_be_read_is_skipped_whole(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Once in the record, the same after a resume; without --skip-bad-shards an error naming it."""
    for path in folder.glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "000_00001.parquet"
    column = pq.ParquetFile(bad).metadata.row_group(2).column(0)
    content = bytearray(bad.read_bytes())
    content[column.dictionary_page_offset + 60] ^= 0xFF
    bad.write_bytes(content)
    options = options_of(tmp_path, block_size=32, samples_per_step=4)
    with pytest.raises(DataError, match=r"000_00001\.parquet, row group 2"):
        opened = open_stream(options, tokenizer)
        while opened.source.next_step().progress.position.epoch == 0:
            pass
    opened.source.close()
    options = replace(options, skip_bad_shards=True)
    source = open_stream(options, tokenizer)
    steps = [source.source.next_step()]
    while steps[-1].progress.position.epoch == 0:
        steps.append(source.source.next_step())
    source.source.close()
    skip = steps[-1].progress.skipped[0]
    assert (skip["file_name"], skip["row_group"], skip["row"], skip["rows"]) == (bad.name, 2, 14, 7)
    assert len(steps[-2].progress.skipped) == 1
    for index in range(0, len(steps) - 1, 7):
        again = resume(source, steps[index].progress, options, tokenizer)
        for step in steps[index + 1 : index + 3]:
            found = again.source.next_step()
            assert np.array_equal(found.tokens, step.tokens) and found.progress == step.progress
        again.source.close()


def test_arrow_shards_are_shuffled_too(tokenizer: Any, tmp_path: Path) -> None:
    texts = corpus.short_texts(40, 100)
    table = pa.table({"text": texts})
    (tmp_path / "arrow").mkdir()
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet" / "a.parquet", row_group_size=9)
    with (
        pa.OSFile(str(tmp_path / "arrow" / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=9)
    found = []
    for kind in ("arrow", "parquet"):
        source = open_stream(options_of(tmp_path / kind, block_size=90), tokenizer).source
        found.append(np.concatenate([source.next_step().tokens for _ in range(30)]))
        source.close()
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_held_out_part_is_the_rest(
    folder: Path, tokenizer: Any, tmp_path: Path, shuffle: bool, streaming: bool
) -> None:
    """Two parts that share no document, together all of them, whatever the order."""
    if shuffle and not streaming:
        return
    every = 5
    options = options_of(folder, shuffle=shuffle, holdout=every, block_size=1, streaming=streaming)
    options = replace(options, cache_dir=tmp_path / "cache", packing=True)
    texts = [text for _, _, text in natural_rows(folder) if text]
    held = [text for text in texts if is_held_out(text, every)]
    kept = [text for text in texts if not is_held_out(text, every)]
    assert 5 < len(held) < 40
    (part,) = held_out_options(options).values()
    for opened_options, expected in ((options, kept), (part, held)):
        total = sum(len(ids_of(text, tokenizer)) for text in expected)
        if not opened_options.streaming:
            total -= 1  # the last token has no target in its epoch
        opened = open_stream(replace(opened_options, samples_per_step=total), tokenizer)
        step = opened.source.next_step()
        opened.source.close()
        if opened_options.streaming:
            found = tokenizer.decode(step.tokens[:, 0].tolist()).split(tokenizer.eos_token)[:-1]
            assert sorted(found) == sorted(expected)
            assert (found == expected) is not opened_options.shuffle
            rows = shuffled_rows(folder, SEED, 1) if opened_options.shuffle else natural_rows(folder)
            again = [text for _, _, text in rows if text]
            passed = next(number for number, text in enumerate(again) if text in expected)
            assert step.progress.counts.held_out_rows == len(texts) - len(expected) + passed
        else:
            ids = [token for text in expected for token in ids_of(text, tokenizer)]
            assert sorted(step.tokens[:, 0].tolist()) == sorted(ids[:-1])


def test_the_documented_hash(folder: Path) -> None:
    names = documented(3)
    for _, _, text in natural_rows(folder):
        if text:
            assert names["is_held_out"](text, 3) == is_held_out(text, 3)
            assert Holdout(every=3, held_out=True).keeps(text) == is_held_out(text, 3)
            assert Holdout(every=3).keeps(text) != is_held_out(text, 3)


def test_another_holdout_is_refused(folder: Path, tokenizer: Any) -> None:
    source = open_stream(options_of(folder, holdout=5), tokenizer)
    progress = source.source.next_step().progress
    source.source.close()
    for other in (None, 6):
        with pytest.raises(DataError, match=f"--holdout was 5, is {other}"):
            resume(source, progress, options_of(folder, holdout=other), tokenizer)


def test_nothing_left_names_the_flag(tokenizer: Any, tmp_path: Path) -> None:
    text = next(f"text {number}" for number in itertools.count() if is_held_out(f"text {number}", 2))
    corpus.write_shards(tmp_path, [text], shards=1)
    source = open_stream(options_of(tmp_path, holdout=2, shuffle=False), tokenizer).source
    with pytest.raises(DataError, match="--holdout"):
        source.next_step()
    source.close()
