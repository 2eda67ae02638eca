"""A changed list of excluded documents at a resume: the samples that follow, and what is refused."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import argonne.testing.corpus as corpus
from argonne.data.exclusion_resume import refuse_read
from argonne.data.source import DataProgress, SourceOptions
from argonne.errors import DataError
from argonne.testing.sources import source_options
from data_stream import OpenedStream, ReadBeforeError, open_stream, read_before
from tests.data.excluded_samples import (
    Packed,
    blocks_of,
    holds,
    ids,
    shuffled_blocks,
    tokens_of,
    windows_of,
    write_list,
)
from tests.data.mixture_samples import options_of, write_sources
from tests.data.naive import natural_rows, shuffled_rows

SIZE, G = 16, 3
SHARDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    texts = list(corpus.short_texts(36, 200))
    texts[20] = "short"
    corpus.write_shards(path, texts, shards=SHARDS, row_group_rows=5)
    return path


def options(folder: Path, **changes: Any) -> SourceOptions:
    return source_options(folder / "*.parquet", block_size=SIZE, samples_per_step=G, **changes)


def taken(opened: OpenedStream, steps: int) -> tuple[list[list[int]], DataProgress]:
    samples, progress = [], opened.start
    for _ in range(steps):
        step = opened.source.next_step()
        samples += step.tokens.tolist()
        progress = step.progress
    opened.source.close()
    return samples, progress


def saved(opened: OpenedStream, progress: DataProgress) -> dict[str, Any]:
    """What a checkpoint holds, through JSON."""
    content = [opened.position_dict(progress), opened.state_dict(progress)]
    position, state = json.loads(json.dumps(content))
    return {"saved_position": position, "saved_state": state, "global_step": 1}


def places(folder: Path) -> list[tuple[str, int]]:
    return [(name, row) for name, row, _ in natural_rows(folder)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("steps", [4, 11])
def test_the_packed_stream_goes_on_without_them(
    folder: Path, tokenizer: Any, tmp_path: Path, shuffle: bool, steps: int
) -> None:
    def epoch(number: int) -> list[Any]:
        return tokens_of(shuffled_rows(folder, 0, number) if shuffle else natural_rows(folder), tokenizer)

    usual = options(folder, shuffle=shuffle)
    opened = open_stream(usual, tokenizer)
    samples, progress = taken(opened, steps)
    oracle = Packed(epoch, SIZE)
    assert samples == oracle.take(G * steps)
    ahead = [
        (name, row) for name, row, _ in (shuffled_rows(folder, 0, 0) if shuffle else natural_rows(folder))
    ]
    listed = [ahead[-1], ahead[-5], ahead[-6]]
    oracle.leave_out(listed)
    again = open_stream(
        replace(usual, exclude=write_list(tmp_path / "list", listed)), tokenizer, **saved(opened, progress)
    )
    assert "excluded documents: 0 -> 3 (--exclude-documents)" in again.notices
    rest, later = taken(again, 60)
    assert rest == oracle.take(60 * G)  # into the epoch after
    once_more = open_stream(usual, tokenizer, **saved(again, later))
    assert "excluded documents: 3 -> 0 (--exclude-documents)" in once_more.notices
    once_more.source.close()
    same = open_stream(replace(usual, exclude=tmp_path / "list"), tokenizer, **saved(again, later))
    assert not same.notices
    same.source.close()


def test_each_document_alone(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    usual = options(folder, packing=False)
    opened = open_stream(usual, tokenizer)
    samples, progress = taken(opened, 12)
    windows = [
        w for document in tokens_of(natural_rows(folder), tokenizer) for w in windows_of(document, SIZE)
    ]
    assert samples == [ids(window) for window in windows[: 12 * G]]
    ahead = {token.place for window in windows[12 * G :] for token in window}
    behind = {token.place for window in windows[: 12 * G] for token in window}
    clean = sorted(ahead - behind)
    listed = [clean[0], clean[3]]
    rest = [ids(window) for window in windows[12 * G :] if not holds(window, listed)]
    state = saved(opened, progress)
    again = open_stream(replace(usual, exclude=write_list(tmp_path / "l", listed)), tokenizer, **state)
    assert taken(again, len(rest) // G)[0] == rest[: len(rest) // G * G]
    for place in places(folder):
        exclude = write_list(tmp_path / "l", [place])
        assert (read_before(replace(usual, exclude=exclude), tokenizer, **state) is not None) == (
            place in behind
        )


@pytest.mark.parametrize("packing", [True, False])
def test_without_streaming_the_samples_that_hold_them_are_left_out(
    folder: Path, tokenizer: Any, tmp_path: Path, packing: bool
) -> None:
    usual = options(folder, packing=packing, streaming=False, cache_dir=tmp_path / "cache")
    documents = tokens_of(natural_rows(folder), tokenizer)
    blocks = blocks_of(documents, SIZE)
    if not packing:
        blocks = [window for document in documents for window in windows_of(document, SIZE)]
    opened = open_stream(usual, tokenizer)
    samples, progress = taken(opened, 8)
    order = list(islice(shuffled_blocks(blocks, 0), 2 * len(blocks)))
    assert samples == [ids(block) for _, block in order[: 8 * G]]
    state = saved(opened, progress)
    behind = {token.place for _, block in order[: 8 * G] for token in block}
    listed = [place for place in places(folder) if place not in behind][:2]
    assert len(listed) == 2
    rest = [ids(block) for _, block in order[8 * G :] if not holds(block, listed)]
    again = open_stream(replace(usual, exclude=write_list(tmp_path / "l", listed)), tokenizer, **state)
    after, later = taken(again, len(rest) // G)
    assert after == rest[: len(rest) // G * G]
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1  # nothing is tokenized again
    assert later.counts.excluded_rows == 2
    with pytest.raises(ReadBeforeError, match="which the run has trained on"):
        open_stream(replace(usual, exclude=write_list(tmp_path / "l", sorted(behind))), tokenizer, **state)


def test_a_cache_made_without_them_stays_so(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    first = write_list(tmp_path / "first", [places(folder)[3]])
    usual = options(folder, streaming=False, cache_dir=tmp_path / "cache", exclude=first)
    opened = open_stream(usual, tokenizer)
    _, progress = taken(opened, 2)
    state = saved(opened, progress)
    same, _ = taken(open_stream(usual, tokenizer, **state), 3)
    unbroken, _ = taken(open_stream(usual, tokenizer), 5)
    assert same == unbroken[2 * G :]
    with pytest.raises(DataError, match="no longer names 1 documents that the token cache"):
        open_stream(replace(usual, exclude=None), tokenizer, **state)


@pytest.mark.parametrize("shuffle", [False, True])
def test_exactly_what_was_trained_on_is_refused(
    folder: Path, tokenizer: Any, tmp_path: Path, shuffle: bool
) -> None:
    usual = options(folder, shuffle=shuffle)
    opened = open_stream(usual, tokenizer)
    _, progress = taken(opened, 7)
    state = saved(opened, progress)
    rows = shuffled_rows(folder, 0, 0) if shuffle else natural_rows(folder)
    stream = [token for document in tokens_of(rows, tokenizer) for token in document]
    seen = {token.place for token in stream[: 7 * G * SIZE + 1]}
    for place in places(folder):
        found = replace(usual, exclude=write_list(tmp_path / "l", [place]))
        named = read_before(found, tokenizer, **state)
        assert named == (f"{place[0]} row {place[1]}" if place in seen else None)
    first = sorted(seen)[0]
    found = replace(usual, exclude=write_list(tmp_path / "l", [first]))
    with pytest.raises(
        ReadBeforeError, match=f"names {first[0]} row {first[1]}, which the run has trained on"
    ):
        open_stream(found, tokenizer, **state)
    allowed = open_stream(replace(found, allow_data_change=True), tokenizer, **state)
    one = f"--exclude-documents names {first[0]} row {first[1]}, which the run has trained on: it is left out"
    assert any(notice.startswith(one) for notice in allowed.notices)
    allowed.source.close()
    every = replace(usual, exclude=write_list(tmp_path / "l", places(folder)[:-1]), allow_data_change=True)
    allowed = open_stream(every, tokenizer, **state)
    listed = sorted(seen & set(places(folder)[:-1]))
    words = ", ".join(f"{name} row {row}" for name, row in listed[:3])
    dots = ", ..." if len(listed) > 3 else ""
    all_named = (
        f"--exclude-documents names {len(listed)} documents that the run has trained on ({words}{dots}): "
        "they are left out from here on"
    )
    assert all_named in allowed.notices
    allowed.source.close()
    fresh = open_stream(found, tokenizer)  # from scratch any list is fine
    fresh.source.close()


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "names 0, which the run has trained on: it is left out"),
        (2, "names 2 documents that the run has trained on (0, 1): they are left out"),
        (3, "names 3 documents that the run has trained on (0, 1, 2): they"),
        (4, "names 4 documents that the run has trained on (0, 1, 2, ...): they"),
        (1000, "names 1,000 documents that the run has trained on (0, 1, 2, ...)"),
        (5000, "names more than 1,000 documents that the run has trained on (0, 1, 2, ...)"),
    ],
)
def test_what_was_trained_on_already_is_counted(count: int, words: str) -> None:
    documents = iter([str(number) for number in range(count)])
    (notice,) = refuse_read(documents, allow_data_change=True)
    assert notice.startswith(f"--exclude-documents {words}") and notice.endswith("left out from here on")
    assert len(list(documents)) == max(0, count - 1001), "asked further than it counts"
    assert refuse_read(iter(()), allow_data_change=True) == []


def test_a_mixture_is_asked_source_by_source(tokenizer: Any, tmp_path: Path) -> None:
    folders = write_sources(tmp_path)
    usual = options_of(folders)
    opened = open_stream(usual, tokenizer)
    _, progress = taken(opened, 30)
    state = saved(opened, progress)
    shard = "000_00000.parquet"
    for name, place in progress.positions.items():
        passed = (place.epoch, place.file_index, place.row)
        for row in (0, 2):
            exclude = write_list(tmp_path / "l", [(shard, row)], source=name)
            read = read_before(replace(usual, exclude=exclude), tokenizer, **state)
            expected = f"source {name!r}: {shard} row {row}" if (0, 0, row) <= passed else None
            assert read == expected


def test_a_cache_of_an_older_version_has_no_rows(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    usual = options(folder, streaming=False, cache_dir=tmp_path / "cache")
    opened = open_stream(usual, tokenizer)
    _, progress = taken(opened, 4)
    (rows,) = (tmp_path / "cache").glob("tokens-*/rows.bin")
    state = saved(opened, progress)
    order = shuffled_blocks(blocks_of(tokens_of(natural_rows(folder), tokenizer), SIZE), 0)
    seen = {token.place for _, block in islice(order, 4 * G) for token in block}
    rows.unlink()
    for place in places(folder)[::5]:
        exclude = write_list(tmp_path / "l", [place])
        assert (read_before(replace(usual, exclude=exclude), tokenizer, **state) is None) == (
            place not in seen
        )
