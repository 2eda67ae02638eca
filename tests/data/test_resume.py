"""Is today's data the checkpoint's: what must match, what may change, and where the stream goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argonne.data.documents import Counts
from argonne.data.position import DataPosition
from argonne.data.resume import check_identity, place, restored_progress, resume, touched_notices
from argonne.data.shards import Shard, manifest
from argonne.data.source import NO_HASH, SourceOptions
from argonne.errors import DataError
from argonne.testing.sources import source_options

IDENTITY: dict[str, Any] = {
    "tokenizer": "abc",
    "text_column": "text",
    "packing": True,
    "streaming": True,
    "block_size": 8,
    "samples_per_step": 2,
    "seed": 0,
    "shuffle": False,
    "holdout": None,
    "document_attention": False,
}
OPTIONS = source_options("data/*.parquet")
LENIENT = replace(OPTIONS, allow_data_change=True)


def shard(name: str, rows: int = 10) -> Shard:
    return Shard(
        path=Path("data", name),
        name=name,
        size=100 + rows,
        mtime_ns=5,
        digest=f"d-{name}",
        group_rows=(rows,),
    )


SHARDS = [shard(f"{name}.parquet") for name in ("s1", "s2", "s10")]


def position(name: str = "s2.parquet", **more: Any) -> DataPosition:
    given: dict[str, Any] = {"epoch": 1, "file_index": 1, "row": 4, "token_offset": 3, "block_size": 8}
    return DataPosition(**{**given, "file_name": name, **more})


def state(shards: list[Shard] = SHARDS, **more: Any) -> dict[str, Any]:
    counts = Counts(documents=14)._asdict()
    saved = {"stream_hash": "ab" * 16, "samples": 6, "counts": counts, "skipped": [{"row": 1}]}
    return {**IDENTITY, **saved, "manifest": manifest(shards), **more}


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("tokenizer", "xyz", "--tokenizer-path"),
        ("text_column", "ids (tokens)", "--text-column, --token-column"),
        ("shuffle", True, "--shuffle was False, is True"),
        ("holdout", 10, "--holdout was None, is 10"),
    ],
)
def test_what_must_match_is_refused_or_said(key: str, value: Any, flag: str) -> None:
    now = {**IDENTITY, key: value}
    with pytest.raises(
        DataError, match=r"not the checkpoint's: .*: restore it, or --allow-data-change"
    ) as caught:
        check_identity(IDENTITY, now, False)
    assert flag in str(caught.value)
    (told,) = check_identity(IDENTITY, now, True)
    assert told.startswith("the data is not the checkpoint's: ") and flag in told


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("block_size", 16, "--block-size was 8 in the checkpoint, is 16"),
        ("samples_per_step", 4, "the global batch"),
        ("packing", False, "packing (--no-packing turns it off)"),
        ("document_attention", True, "--document-attention"),
    ],
)
def test_what_may_change_in_a_stream_is_said(key: str, value: Any, flag: str) -> None:
    (told,) = check_identity(IDENTITY, {**IDENTITY, key: value}, False)
    assert flag in told


@pytest.mark.parametrize(
    ("order", "refused"),
    [
        ({}, set()),
        ({"shuffle": True}, {"seed"}),
        ({"streaming": False}, {"seed", "block_size", "packing"}),
    ],
)
def test_a_place_in_an_order_needs_more(order: dict[str, Any], refused: set[str]) -> None:
    saved = {**IDENTITY, **order}
    for key, value in (("seed", 1), ("block_size", 16), ("packing", False), ("samples_per_step", 4)):
        now = {**saved, key: value}
        if key in refused:
            with pytest.raises(DataError, match="is not the checkpoint's"):
                check_identity(saved, now, False)
        else:
            assert len(check_identity(saved, now, False)) == (0 if key == "seed" else 1)


def test_older_checkpoints_do_not_have_all_keys() -> None:
    older = {
        key: value
        for key, value in IDENTITY.items()
        if key not in ("shuffle", "holdout", "document_attention")
    }
    assert check_identity(older, IDENTITY, False) == []
    with pytest.raises(DataError, match="--holdout was None, is 4"):
        check_identity(older, {**IDENTITY, "holdout": 4}, False)


def test_a_saved_place_is_found_by_the_shards_name() -> None:
    more = [shard("s0.parquet"), *SHARDS]
    assert place(position(), more, OPTIONS, shuffle_known=True) == (position(file_index=2), [])
    pipeline = position("", file_index=2)
    assert place(pipeline, SHARDS, OPTIONS, shuffle_known=False)[0].file_name == "s10.parquet"
    with pytest.raises(DataError, match=r"shard number 3 \(from 0\), --data-glob gives 3: give the corpus"):
        place(position("", file_index=3), SHARDS, OPTIONS, shuffle_known=False)


@pytest.mark.parametrize(
    ("name", "epoch", "following"),
    [("s3.parquet", 1, "s10.parquet"), ("s0.parquet", 1, "s1.parquet"), ("s11.parquet", 2, "s1.parquet")],
)
def test_from_a_shard_that_is_gone_the_next_in_natural_order_follows(
    name: str, epoch: int, following: str
) -> None:
    with pytest.raises(DataError, match=rf"in shard '{name}', which --data-glob does not give: restore it"):
        place(position(name), SHARDS, OPTIONS, shuffle_known=True)
    found, (told,) = place(position(name), SHARDS, LENIENT, shuffle_known=True)
    assert (found.epoch, found.file_name, found.row, found.token_offset) == (epoch, following, 0, 0)
    assert told.endswith(f"going on with {following!r}")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_place_of_the_other_kind_begins_the_data_anew_where_allowed(streaming: bool) -> None:
    options = replace(OPTIONS, streaming=streaming)
    other = DataPosition(sample=5) if streaming else position()
    remedy = "give --no-streaming" if streaming else "leave --no-streaming out"
    with pytest.raises(DataError, match=f"streaming one: {remedy}, or --allow-data-change"):
        place(other, SHARDS, options, shuffle_known=True)
    found, (told,) = place(other, SHARDS, replace(options, allow_data_change=True), shuffle_known=True)
    assert (found.sample, found.file_name) == ((None, "s1.parquet") if streaming else (0, ""))
    assert told.endswith("the data begins anew")


def test_a_pipelines_count_of_samples_goes_on_with_a_remark() -> None:
    options = replace(OPTIONS, streaming=False)
    there = DataPosition(sample=5, epoch=1)
    assert place(there, SHARDS, options, shuffle_known=True) == (there, [])
    found, (told,) = place(there, SHARDS, options, shuffle_known=False)
    assert found == there and "goes on in our own order" in told


def resumed(options: SourceOptions = OPTIONS, shards: list[Shard] = SHARDS, **saved: Any) -> Any:
    given = {"saved_position": position().to_dict(), "saved_state": state(), **saved}
    return resume(options, shards, given["saved_position"], given["saved_state"], global_step=3)


def test_a_new_run_begins_at_the_first_row() -> None:
    progress, notices = resume(OPTIONS, SHARDS, None, None, 0)
    assert (progress.position.file_name, progress.position.row, progress.stream_hash) == (
        "s1.parquet",
        0,
        NO_HASH,
    )
    assert notices == [] and progress.samples == 0


def test_a_resume_has_place_hash_and_counts() -> None:
    progress, notices = resumed()
    assert progress.position == position() and notices == []
    assert (progress.stream_hash, progress.samples, progress.counts.documents) == ("ab" * 16, 6, 14)
    assert progress.skipped == ({"row": 1},)
    assert restored_progress(state(), position()) == progress


def test_shards_at_the_end_may_be_added_to_a_stream_but_change_an_order() -> None:
    more = [*SHARDS, shard("s11.parquet")]
    assert resumed(shards=more)[0].position == position()
    shuffled = replace(OPTIONS, shuffle=True)
    with pytest.raises(DataError, match="added at the end, which changes the shuffled order: 4 shards now"):
        resumed(shuffled, more, saved_state=state(shuffle=True))
    progress, notices = resumed(
        replace(shuffled, allow_data_change=True), more, saved_state=state(shuffle=True)
    )
    assert (progress.position.epoch, progress.position.token_offset) == (2, 0)
    assert "the order of epoch 1 is not the checkpoint's: epoch 2 begins" in notices


def test_an_order_of_another_seed_begins_with_the_next_epoch() -> None:
    shuffled = replace(OPTIONS, shuffle=True, seed=3)
    progress, notices = resumed(shuffled, saved_state=state(shuffle=True))
    assert progress.position.epoch == 2 and notices[-1].endswith("epoch 2 begins")
    assert resumed(shuffled, saved_state=state(shuffle=True, seed=3))[0].position == position()


def test_a_shard_that_was_rewritten_or_removed_is_named() -> None:
    rewritten = [SHARDS[0], shard("s2.parquet", rows=11), SHARDS[2]]
    with pytest.raises(DataError, match=r"s2\.parquet"):
        resumed(shards=rewritten)
    with pytest.raises(DataError, match=r"s1\.parquet"):
        resumed(shards=SHARDS[1:])
    progress, notices = resumed(LENIENT, SHARDS[1:])
    assert progress.position == position(file_index=0) and len(notices) == 1


def test_touched_shards_are_counted_and_three_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"s{number}" for number in range(5)]
    for count, end in ((0, None), (3, "s0, s1, s2"), (5, "s0, s1, s2, ...")):
        monkeypatch.setattr("argonne.data.resume.touched", lambda *_, count=count: names[:count])
        notices = touched_notices(state(), SHARDS)
        assert [notice.split(": ")[1] for notice in notices] == ([] if end is None else [end])
