"""Text, token columns and flat files in one mixture, their document marks, and shuffle and holdout of ids."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

import argonne.data.flat_tokens as flat_tokens
from argonne.data.feed import FEED_TIMEOUT, StepFeed
from argonne.data.held_out import read_held_out
from argonne.data.source import MixPart, SourceOptions
from argonne.data.tokenizer import load_tokenizer
from argonne.errors import DataError
from argonne.testing.corpus import build_tokenizer, short_texts, write_shards
from argonne.testing.distributed import run_ranks
from data_stream import held_out_options, open_stream
from tests.data.shard_samples import options_for, resume
from tests.data.token_samples import documents_of, write_flat, write_lists

WEIGHTS = {"web": "0.5", "code": "0.3", "books": "0.2"}
LISTS = pa.list_(pa.int32())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(build_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def globs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    """A source of text, one of a list column and one of a flat file."""
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(folder / "web", short_texts(30, 90), shards=2)
    write_lists(folder / "code/a.parquet", documents_of(tokenizer, short_texts(25, 70, skip=40)), LISTS)
    books = documents_of(tokenizer, short_texts(20, 80, skip=80))
    write_flat(folder / "books/a.bin", [token for ids in books for token in ids])
    return {"web": f"{folder}/web/*.parquet", "code": f"{folder}/code/*", "books": f"{folder}/books/*.bin"}


def mixed(globs: dict[str, str], **changes: Any) -> SourceOptions:
    mix = tuple(MixPart(name, weight, globs[name]) for name, weight in WEIGHTS.items())
    wanted = {"mix": mix, "token_column": "ids", "samples_per_step": 7, "document_attention": True} | changes
    return options_for(Path("unused"), **wanted)


def alone(globs: dict[str, str], name: str, tokenizer: Any, count: int) -> tuple[Any, Any]:
    """The first samples of one source, and where documents begin in them."""
    column = None if name == "web" else "ids"
    options = options_for(Path("unused"), data_glob=globs[name], token_column=column, document_attention=True)
    opened = open_stream(replace(options, samples_per_step=count), tokenizer)
    step = opened.source.next_step()
    opened.source.close()
    return step.tokens, step.starts


def test_a_mixture_of_all_kinds_carries_their_marks(globs: dict[str, str], tokenizer: Any) -> None:
    """Each source's samples with their marks are those that it has alone, also after a resume."""
    opened = open_stream(mixed(globs), tokenizer)
    steps: list[Any] = [opened.source.next_step() for _ in range(9)]
    again = resume(opened, steps[3].progress, mixed(globs), tokenizer)
    opened.source.close()
    for step in steps[4:]:
        later: Any = again.source.next_step()
        assert (later.tokens == step.tokens).all() and (later.starts == step.starts).all()
        assert later.progress.stream_hash == step.progress.stream_hash
    again.source.close()
    chosen = np.concatenate([step.sources for step in steps])
    tokens = np.concatenate([step.tokens for step in steps])
    starts = np.concatenate([step.starts for step in steps])
    for number, name in enumerate(WEIGHTS):
        mine = chosen == number
        its_tokens, its_starts = alone(globs, name, tokenizer, int(mine.sum()))
        assert (tokens[mine] == its_tokens).all(), name
        assert (starts[mine] == its_starts).all() and its_starts.any(), name


def handed_out(rank: int, world_size: int, globs: dict[str, str], tokenizer_path: str) -> list[Any]:
    group = dist.new_group(backend="gloo", timeout=FEED_TIMEOUT)
    options = mixed(globs, samples_per_step=6)
    source = open_stream(options, load_tokenizer(tokenizer_path)).source if rank == 0 else None
    with StepFeed(source, samples_per_step=6, block_size=8, group=group) as feed:
        batches: list[Any] = [feed.next() for _ in range(4)]
        dist.barrier(group=dist.group.WORLD)
    return [(batch.tokens.numpy(), batch.sources.numpy(), batch.document_ids.numpy()) for batch in batches]


def test_every_rank_gets_sources_and_marks(globs: dict[str, str], tokenizer: Any) -> None:
    source = open_stream(mixed(globs, samples_per_step=6), tokenizer).source
    steps: list[Any] = [source.next_step() for _ in range(4)]
    source.close()
    for batches in run_ranks(handed_out, 2, globs, tokenizer.name_or_path):
        for step, (tokens, sources, documents) in zip(steps, batches, strict=True):
            assert (tokens == step.tokens).all() and (sources == step.sources).all()
            assert (np.diff(documents, axis=1) == step.starts[:, 1:]).all()


def test_a_mixture_is_not_marked_unasked(globs: dict[str, str], tokenizer: Any) -> None:
    opened = open_stream(mixed(globs, document_attention=False), tokenizer)
    assert opened.source.next_step().starts is None
    opened.source.close()


def test_a_source_with_neither_column_is_named(globs: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"source 'code': .*no column 'ids'"):
        open_stream(mixed({**globs, "code": str(tmp_path)}), tokenizer)


def same_rows(folder: Path, tokenizer: Any) -> tuple[SourceOptions, SourceOptions]:
    """A corpus as text, and as lists of its ids in the same row groups."""
    texts = short_texts(40, 90)
    for number in range(2):
        part = texts[20 * number : 20 * number + 20]
        (folder / "text").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": part}), folder / f"text/{number}.parquet", row_group_size=6)
        write_lists(folder / f"ids/{number}.parquet", documents_of(tokenizer, part), LISTS, group=6)
    text = options_for(folder / "text", document_attention=True)
    return text, options_for(folder / "ids", document_attention=True, token_column="ids")


@pytest.mark.parametrize("kept_cost", [0, 1 << 19])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ids_are_shuffled_like_their_texts(
    shuffle: bool, kept_cost: int, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over epochs and after a resume, from the files and from memory."""
    monkeypatch.setattr("argonne.data.documents.KEPT_COST", kept_cost)
    text, ids = (replace(options, shuffle=shuffle) for options in same_rows(tmp_path, tokenizer))
    streams = [open_stream(options, tokenizer) for options in (text, ids)]
    progress: Any = None
    expected: Any
    found: Any
    for number in range(330):
        expected, found = (stream.source.next_step() for stream in streams)
        assert (expected.tokens == found.tokens).all() and (expected.starts == found.starts).all()
        if number == 90:
            progress = found.progress
    assert found.progress.position.epoch >= 2
    again = resume(streams[1], progress, ids, tokenizer)
    for _ in range(91, 330):
        step = again.source.next_step()
    assert step.progress.stream_hash == found.progress.stream_hash
    for stream in (*streams, again):
        stream.source.close()


def test_the_blocks_of_flat_files_are_shuffled(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block once an epoch, resumed at every step; a block that does not follow its last begins anew."""
    monkeypatch.setattr(flat_tokens, "BLOCK_TOKENS", 32)
    write_flat(tmp_path / "a.bin", range(1, 257))
    options = replace(
        options_for(tmp_path, data_glob=f"{tmp_path}/*.bin", document_attention=True), shuffle=True
    )
    opened = open_stream(options, tokenizer)
    steps: list[Any] = [opened.source.next_step() for _ in range(16)]
    inputs = np.concatenate([step.tokens[:, :-1].ravel() for step in steps])
    assert sorted(inputs.tolist()) == list(range(1, 257)) and inputs.tolist() != list(range(1, 257))
    blocks = inputs.reshape(-1, 32)
    assert (np.diff(blocks, axis=1) == 1).all() and (blocks[:, 0] % 32 == 1).all()
    starts = np.concatenate([step.starts.ravel() for step in steps]).reshape(-1, 32)
    assert (starts[1:, 0] == (blocks[1:, 0] != blocks[:-1, -1] + 1)).all() and not starts[:, 1:].any()
    for number in range(0, 15, 3):
        progress = steps[number].progress
        assert opened.position_dict(progress)["row"] == 0
        again = resume(opened, progress, options, tokenizer)
        assert (again.source.next_step().tokens == steps[number + 1].tokens).all()
        again.source.close()


def test_rows_of_ids_are_held_out_by_their_bytes(tmp_path: Path, tokenizer: Any) -> None:
    documents = documents_of(tokenizer, short_texts(60, 60))
    write_lists(tmp_path / "a.parquet", documents, pa.list_(pa.int64()))

    def is_held(ids: list[int]) -> bool:
        digest = hashlib.blake2b(np.array(ids, "<i4").tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % 4 == 0

    held = [ids for ids in documents if is_held(ids)]
    kept = [ids for ids in documents if not is_held(ids)]
    assert 5 < len(held) < 40
    options = options_for(tmp_path, token_column="ids", holdout=4, block_size=1)
    (part,) = held_out_options(options).values()
    for its_options, expected in ((options, kept), (part, held)):
        ids = [token for document in expected for token in document]
        opened = open_stream(replace(its_options, samples_per_step=len(ids)), tokenizer)
        assert opened.source.next_step().tokens[:, 0].tolist() == ids


def test_flat_files_are_not_held_out(globs: dict[str, str], tokenizer: Any) -> None:
    options = options_for(Path("unused"), data_glob=globs["books"], holdout=4)
    with pytest.raises(DataError, match=r"--holdout .*a\.bin\) has no rows: leave it out"):
        open_stream(options, tokenizer)


@pytest.mark.parametrize("kind", ["ids", "text", "flat"])
def test_validation_sets_of_every_kind(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """The samples are those of the text; the bytes of ids are those of the text that the samples spell."""
    text, ids = same_rows(tmp_path, tokenizer)
    expected = read_held_out("held", text.data_glob, text, tokenizer, 5)
    glob = {"ids": ids.data_glob, "text": text.data_glob, "flat": f"{tmp_path}/*.bin"}[kind]
    rows = [token for row in documents_of(tokenizer, short_texts(40, 90)) for token in row]
    write_flat(tmp_path / "a.bin", rows)
    found = read_held_out("held", glob, ids, tokenizer, 5)
    assert (found.tokens == expected.tokens).all()
    spelled = tokenizer.decode(rows[: 5 * ids.block_size + 1], skip_special_tokens=True)
    assert found.text_bytes == (expected.text_bytes if kind == "text" else len(spelled.encode()))
