"""A mixture at a resume: weights, sources and shards that changed, names, one source and many."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import argonne.testing.corpus as corpus
from argonne.data.source import chain_hash
from argonne.errors import DataError
from argonne.testing.sources import source_options
from data_stream import open_stream
from tests.data.mixture_samples import WEIGHTS, options_of, run_steps, write_sources
from tests.data.naive import Stream, mixture_order
from tests.data.shard_samples import resume


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_changed_weights_and_sources_keep_their_places(folders: dict[str, Path], tokenizer: Any) -> None:
    """n and taken begin at 0, places go on, a source that returns goes on too; one line says what changed."""
    naive = {name: Stream(folders[name], tokenizer) for name in folders}
    used, total = Counter[str](), Counter[str]()
    mixtures: list[dict[str, str]] = [
        {"web": "0.5", "code": "0.5"},
        {"web": "0.2", "code": "0.8"},
        {"code": "2", "math": "1"},
        {"math": "1", "code": "2"},
        {"web": "1", "math": "1"},
    ]
    after = None
    for number, weights in enumerate(mixtures):
        options = options_of(folders, weights, block_size=16, samples_per_step=5)
        opened = open_stream(options, tokenizer) if after is None else resume(*after, options, tokenizer)
        assert len(opened.notices) == (1 if number else 0), opened.notices
        if number:
            assert "the mixture was" in opened.notices[0]
        step = run_steps(opened, 7)[-1]
        for name in (list(weights)[i] for i in mixture_order(list(weights.values()), 35)):
            used[name] += 1
        saved = opened.position_dict(step.progress)
        assert saved["mixture"] == {"weights": weights, "n": 35}
        assert sum(place["samples"] for place in saved["sources"].values()) == 35
        for name in weights:
            naive[name].sample(used[name], 16)
            epoch, file, row, token = naive[name].places[used[name] * 16]
            place = saved["sources"][name]
            assert (place["epoch"], place["file_name"], place["row"], place["token_offset"]) == (
                epoch, file, row, token,
            )  # fmt: skip
        assert step.progress.metrics()["samples_by_source"] == dict(used)
        assert step.progress.samples == sum(used.values())
        total = used
        after = opened, step.progress
    assert total["math"] and total["web"]


def test_the_same_shares_in_other_numbers_go_on(folders: dict[str, Path], tokenizer: Any) -> None:
    first = options_of(folders, {"web": "0.5", "code": "0.25", "math": "0.25"})
    opened = open_stream(first, tokenizer)
    steps = run_steps(opened, 6)
    again = resume(
        opened, steps[2].progress, options_of(folders, {"web": "2", "code": "1", "math": "1.0"}), tokenizer
    )
    assert again.notices == ()
    assert np.array_equal(run_steps(again, 1)[0].tokens, steps[3].tokens)


def test_a_renamed_source_is_not_begun_anew(folders: dict[str, Path], tokenizer: Any) -> None:
    opened = open_stream(options_of(folders), tokenizer)
    progress = run_steps(opened, 9)[-1].progress
    renamed = {**folders, "prose": folders["books"]}
    weights = {"web": "0.62", "code": "0.3", "prose": "0.08"}
    options = options_of(renamed, weights)
    with pytest.raises(DataError, match=r"'books' is gone, and 'prose' has its shards.*--data-mix"):
        resume(opened, progress, options, tokenizer)
    again = resume(opened, progress, replace(options, allow_data_change=True), tokenizer)
    again.source.close()
    assert again.start.positions["prose"] == progress.positions["books"]


def test_a_source_without_shards_or_text_is_named(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    opened = open_stream(options_of(folders), tokenizer)
    progress = run_steps(opened, 2)[-1].progress
    with pytest.raises(DataError, match=r"source 'books': no shard matches .*\(--data-mix\)"):
        resume(opened, progress, options_of({**folders, "books": tmp_path / "gone"}), tokenizer)
    corpus.write_shards(tmp_path / "empty", ["", None, ""], shards=1)
    empty = open_stream(options_of({**folders, "web": tmp_path / "empty"}), tokenizer)
    with pytest.raises(DataError, match="source 'web': the 1 shards hold no text"):
        empty.source.next_step()
    empty.source.close()
    with pytest.raises(DataError, match="source 'code': the data is not the checkpoint's: shards rewritten"):
        resume(opened, progress, options_of({**folders, "code": folders["math"]}), tokenizer)


def test_one_source_becomes_a_mixture_and_the_mixture_one(folders: dict[str, Path], tokenizer: Any) -> None:
    """By the shards: the source that has the checkpoint's takes its place, counts and hash."""
    single = replace(source_options(f"{folders['code']}/*.parquet"), block_size=16)
    opened = open_stream(single, tokenizer)
    steps = run_steps(opened, 12)
    mixed = options_of(folders, block_size=16)
    again = resume(opened, steps[5].progress, mixed, tokenizer)
    assert "'code' has its shards and its place" in again.notices[0]
    step = run_steps(again, 1)[0]
    code = list(WEIGHTS).index("code")
    assert step.sources is not None and code in step.sources
    assert np.array_equal(step.tokens[step.sources == code][0], steps[6].tokens[0])
    assert step.progress.samples == steps[5].progress.samples + 2
    assert step.progress.metrics()["samples_by_source"]["code"] == 12 + 1
    assert step.progress.stream_hash == chain_hash(steps[5].progress.stream_hash, step.tokens)
    with pytest.raises(DataError, match="no source of the mixture has the checkpoint's shards"):
        resume(opened, steps[5].progress, options_of(folders, {"web": "1"}), tokenizer)

    alone = resume(again, step.progress, single, tokenizer)
    assert "source 'code' goes on alone" in alone.notices[0]
    assert np.array_equal(run_steps(alone, 1)[0].tokens[0], steps[6].tokens[1])
    other = replace(single, data_glob=f"{folders['math']}/*.parquet")
    with pytest.raises(DataError, match=r"a mixture \(web, code, books\), and --data-glob"):
        resume(again, step.progress, other, tokenizer)
    anew = resume(again, step.progress, replace(other, allow_data_change=True), tokenizer)
    anew.source.close()
    assert anew.start.position.row == anew.start.position.token_offset == 0


def test_a_pipeline_checkpoint_begins_all_sources(folders: dict[str, Path], tokenizer: Any) -> None:
    saved = {"streaming": True, "current_file_idx": 0, "position_in_file": 3, "chunk_offset": 0, "epoch": 1}
    opened = open_stream(options_of(folders), tokenizer, saved_position=saved, global_step=5)
    opened.source.close()
    assert len(opened.notices) == 1 and "belongs to no source" in opened.notices[0]
    assert all(place.row == place.epoch == 0 for place in opened.start.positions.values())


def test_skipped_data_names_its_source(folders: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    """In the order in which it was met, once, the same after a resume."""
    bad = {}
    for name in ("web", "code"):
        bad[name] = tmp_path / name
        bad[name].mkdir()
        for path in folders[name].glob("*.parquet"):
            (bad[name] / path.name).write_bytes(path.read_bytes())
        (bad[name] / "000_00007.parquet").write_bytes(b"no parquet")
    options = options_of(bad, {"web": "1", "code": "3"}, block_size=64, skip_bad_shards=True)
    opened = open_stream(options, tokenizer)
    steps = run_steps(opened, 400)
    skipped = steps[-1].progress.skipped
    assert [(skip["source"], skip["epoch"]) for skip in skipped[:2]] == [("code", 0), ("code", 1)]
    assert {skip["source"] for skip in skipped} == {"web", "code"}
    for earlier, later in itertools.pairwise(steps):
        assert later.progress.skipped[: len(earlier.progress.skipped)] == earlier.progress.skipped
    for index in (10, 70, 320):
        again = resume(opened, steps[index].progress, options, tokenizer)
        (step,) = run_steps(again, 1)
        assert step.progress == steps[index + 1].progress
