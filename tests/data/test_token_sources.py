"""Sources of token ids: list columns and flat files give the stream of the text they were made of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import argonne.data.flat_tokens as flat_tokens
from argonne.data.shards import open_corpus
from argonne.data.tokenizer import load_tokenizer
from argonne.errors import DataError
from argonne.testing.corpus import build_tokenizer, short_texts, write_shards
from data_stream import SourceOptions, open_stream
from tests.data.shard_samples import options_for, resume
from tests.data.token_samples import documents_of, naive_steps, write_flat, write_lists

TEXTS = short_texts(30, 90)
LISTS: dict[str, pa.DataType] = {
    "int32": pa.list_(pa.int32()),
    "int64": pa.list_(pa.int64()),
    "uint16": pa.large_list(pa.uint16()),
    "uint64": pa.list_(pa.uint64()),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(build_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def joined(documents: list[list[int]]) -> list[int]:
    return [token for ids in documents for token in ids]


def tokens_of(options: SourceOptions, tokenizer: Any, steps: int) -> list[np.ndarray]:
    source = open_stream(options, tokenizer).source
    taken = [source.next_step().tokens for _ in range(steps)]
    source.close()
    return taken


def assert_stream(options: SourceOptions, tokenizer: Any, documents: Any, steps: int = 40) -> None:
    expected = naive_steps(documents, options.block_size, options.samples_per_step, steps)
    for taken, wanted in zip(tokens_of(options, tokenizer, steps), expected, strict=True):
        assert (taken == wanted).all()


@pytest.mark.parametrize("kind", LISTS)
def test_list_columns_are_read_as_they_are(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """Null and empty rows are passed over and counted, no EOS is added."""
    documents = documents_of(tokenizer, TEXTS)
    bare = [ids[:-1] for ids in documents]
    write_lists(tmp_path / "000_2.parquet", [*bare[:9], None, []], LISTS[kind])
    write_lists(tmp_path / "000_10.parquet", bare[9:], LISTS[kind])
    options = options_for(tmp_path, token_column="ids")
    assert_stream(options, tokenizer, bare, 150)
    source = open_stream(options, tokenizer).source
    steps = [source.next_step() for _ in range(60)]
    counts = steps[-1].progress.counts
    assert counts.null_rows >= 1 and counts.empty_rows >= 1 and counts.replaced_rows == 0


def arrow_variants(documents: list[list[int]]) -> dict[str, pa.Array]:
    plain = pa.array(documents, pa.list_(pa.int32()))
    words = pa.array([token for ids in documents for token in ids], pa.int32()).dictionary_encode()
    return {
        "plain": plain,
        "sliced": pa.concat_arrays([plain[:3], plain])[3:],
        "dictionary of lists": pa.DictionaryArray.from_arrays(
            pa.array(range(len(documents)), pa.int32()), plain
        ),
        "lists of a dictionary": pa.ListArray.from_arrays(plain.offsets, words),
    }


@pytest.mark.parametrize("kind", ["plain", "sliced", "dictionary of lists", "lists of a dictionary"])
def test_arrow_files_of_lists(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    documents = documents_of(tokenizer, TEXTS)
    table = pa.table({"ids": arrow_variants(documents)[kind]})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    options = options_for(tmp_path, data_glob=f"{tmp_path}/*.arrow", token_column="ids")
    assert_stream(options, tokenizer, documents)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_flat_files(dtype: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In natural order, whole or in blocks, found by glob or folder, without any flag."""
    monkeypatch.setattr(flat_tokens, "BLOCK_TOKENS", 50)
    documents = documents_of(tokenizer, TEXTS)
    write_flat(tmp_path / "f_2.bin", joined(documents[:9]), dtype)
    write_flat(tmp_path / "f_10.bin", joined(documents[9:]), dtype)
    write_flat(tmp_path / "f_11.bin", [], dtype)
    for glob in (str(tmp_path), f"{tmp_path}/*.bin"):
        assert_stream(options_for(tmp_path, data_glob=glob), tokenizer, documents, 150)


def test_a_fixed_size_list_is_a_stream_in_blocks(tmp_path: Path, tokenizer: Any) -> None:
    """Its rows are not documents: EOS ids end those, for document attention, as in a flat file."""
    ids = np.concatenate([np.asarray(d) for d in documents_of(tokenizer, TEXTS)])
    rows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    write_lists(tmp_path / "a.parquet", rows.tolist(), pa.list_(pa.int32(), 32))
    write_flat(tmp_path / "flat" / "a.bin", rows.ravel())
    listed = options_for(tmp_path, token_column="ids", document_attention=True)
    flat = options_for(tmp_path, data_glob=f"{tmp_path}/flat/*.bin", document_attention=True)
    one, other = open_stream(listed, tokenizer).source, open_stream(flat, tokenizer).source
    for number in range(len(rows) * 32 // 16 - 1):
        step, same = one.next_step(), other.next_step()
        assert (step.tokens == same.tokens).all()
        assert (step.starts[:, 1:] == (step.tokens[:, :-2] == tokenizer.eos_token_id)).all(), number  # type: ignore[index]
        assert (step.starts[:, 1:] == same.starts[:, 1:]).all()  # type: ignore[index]


def test_rows_of_lists_are_documents(tmp_path: Path, tokenizer: Any) -> None:
    """Also where they hold an EOS of their own, or none: as in text, the row decides."""
    eos = tokenizer.eos_token_id
    write_lists(tmp_path / "a.parquet", [[1, 2, eos, 3], [4], [5, 6, 7]], pa.list_(pa.int32()))
    options = options_for(tmp_path, token_column="ids", document_attention=True)
    step = open_stream(options, tokenizer).source.next_step()
    assert step.starts is not None
    begins = [i % 8 in (0, 4, 5) for i in range(16)]
    assert step.starts.ravel().tolist()[1:] == begins[1:]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["list", "flat"])
def test_resume_is_exact(
    kind: str, streaming: bool, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, with another G on the way, tokens and hash are those of an unbroken run."""
    monkeypatch.setattr(flat_tokens, "BLOCK_TOKENS", 37)
    documents = documents_of(tokenizer, TEXTS[:8])
    if kind == "list":
        write_lists(tmp_path / "a.parquet", documents, pa.list_(pa.int32()), group=3)
        changes: dict[str, Any] = {"token_column": "ids"}
    else:
        write_flat(tmp_path / "a.bin", joined(documents[:5]))
        write_flat(tmp_path / "b.bin", joined(documents[5:]))
        changes = {"data_glob": f"{tmp_path}/*.bin"}
    changes |= {"streaming": streaming, "cache_dir": tmp_path / "cache", "document_attention": True}
    options = options_for(tmp_path, **changes)
    whole = open_stream(options, tokenizer)
    steps = [whole.source.next_step() for _ in range(60)]
    for number in (0, 1, 7, 20, 41):
        opened = resume(whole, steps[number].progress, options, tokenizer)
        for expected in steps[number + 1 : number + 12]:
            step = opened.source.next_step()
            assert (step.tokens == expected.tokens).all()
            assert (step.starts[:, 1:] == expected.starts[:, 1:]).all()  # type: ignore[index]
            assert step.progress.stream_hash == expected.progress.stream_hash
            assert step.progress.position == expected.progress.position
    larger = replace(options, samples_per_step=4)
    again = resume(whole, steps[9].progress, larger, tokenizer).source.next_step()
    assert (again.tokens == np.concatenate([steps[10].tokens, steps[11].tokens])).all()
    assert again.progress.stream_hash == steps[11].progress.stream_hash


def test_a_flat_position_is_an_offset_in_the_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_tokens, "BLOCK_TOKENS", 37)
    write_flat(tmp_path / "a.bin", list(range(200)))
    opened = open_stream(options_for(tmp_path, data_glob=str(tmp_path)), tokenizer)
    for _ in range(7):
        step = opened.source.next_step()
    saved = opened.position_dict(step.progress)
    assert (saved["file_name"], saved["row"], saved["token_offset"]) == ("a.bin", 0, 7 * 16)
    assert step.tokens[0, 0] == 6 * 16


@pytest.mark.parametrize("skip", [False, True])
def test_ids_beyond_the_vocabulary_are_named(
    skip: bool, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_tokens, "BLOCK_TOKENS", 50)
    size = len(tokenizer)
    rows = [[1, 2, 3], [4, 5], [6, size, 7], [8] * 20, [9] * 20]
    write_lists(tmp_path / "a.parquet", rows, pa.list_(pa.int64()), group=3)
    write_flat(tmp_path / "a.bin", [1] * 60 + [size + 7] + [2] * 139)
    wanted = {
        "parquet": f"a.parquet, row group 0: row 2, token 1: the id {size} is beyond",
        "bin": f"a.bin, row group 1: token 60 of the file: the id {size + 7} is beyond",
    }
    for suffix, message in wanted.items():
        column = "ids" if suffix == "parquet" else None
        options = options_for(
            tmp_path, data_glob=f"{tmp_path}/*.{suffix}", token_column=column, skip_bad_shards=skip
        )
        source = open_stream(options, tokenizer).source
        if not skip:
            with pytest.raises(DataError, match=f"{message} the vocabulary of {size}"):
                for _ in range(10):
                    source.next_step()
            continue
        for _ in range(10):
            step = source.next_step()
            assert step.tokens.max() < size
        assert message.partition(": ")[2] in step.progress.skipped[0]["reason"]


def test_negative_ids_and_nulls_among_them(tmp_path: Path, tokenizer: Any) -> None:
    cases: list[tuple[list[list[int | None]], str]] = [
        ([[1], [2, -3]], "row 1, token 1: the id -3"),
        ([[1], [], [2, None]], "row 2, token 1: a null"),
    ]
    for number, (rows, said) in enumerate(cases):
        folder = tmp_path / str(number)
        write_lists(folder / "a.parquet", rows, pa.list_(pa.int32()))
        with pytest.raises(DataError, match=said):
            open_stream(options_for(folder, token_column="ids"), tokenizer).source.next_step()


@pytest.mark.parametrize(
    ("header", "cut", "said"),
    [
        ({"magic": 20240521}, 0, "its first number is 20240521"),
        ({"version": 2}, 0, "version 2"),
        ({"count": 31}, 0, "says 31 tokens"),
        ({}, 1, "says 30 tokens"),
        ({}, 100, "shorter than the header"),
        ({}, 10_000, "0 bytes"),
    ],
)
def test_flat_files_that_are_none(
    header: dict[str, Any], cut: int, said: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = write_flat(tmp_path / "a.bin", [1] * 30, **header)
    if cut:
        content = path.read_bytes()
        path.write_bytes(content[: 900 if cut == 100 else max(0, len(content) - cut)])
    with pytest.raises(DataError, match=f"a.bin.*{said}"):
        open_stream(options_for(tmp_path, data_glob=f"{tmp_path}/*.bin"), tokenizer)


def test_columns_that_are_no_tokens(tmp_path: Path, tokenizer: Any) -> None:
    write_lists(tmp_path / "a.parquet", [[1.5]], pa.list_(pa.float32()))
    with pytest.raises(DataError, match=r"'ids' is list<.*float.*not lists of token ids.*--token-column"):
        open_stream(options_for(tmp_path, token_column="ids"), tokenizer)
    with pytest.raises(DataError, match=r"no column 'x' \(columns: ids.*--token-column"):
        open_stream(options_for(tmp_path, token_column="x"), tokenizer)


def test_text_and_tokens_are_two_sources(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path, TEXTS[:3], shards=1)
    write_flat(tmp_path / "a.bin", [1] * 30)
    with pytest.raises(DataError, match="1 of 2 shards are flat token files"):
        open_stream(options_for(tmp_path, data_glob=str(tmp_path)), tokenizer)
    with pytest.raises(DataError, match="--no-packing"):
        open_stream(options_for(tmp_path, data_glob=f"{tmp_path}/*.bin", packing=False), tokenizer)


def test_the_kind_of_a_column_is_part_of_the_data(tmp_path: Path, tokenizer: Any) -> None:
    """A resume with text where tokens were is refused; the footer index does not mix the two up."""
    documents = documents_of(tokenizer, TEXTS)
    table = pa.table({"text": pa.array(documents, pa.list_(pa.int32()))})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    options = options_for(tmp_path, token_column="text", cache_dir=tmp_path / "cache")
    opened = open_stream(options, tokenizer)
    progress = opened.source.next_step().progress
    with pytest.raises(DataError, match=r"'text' is list<.*not text"):
        open_corpus(options.data_glob, "text", cache_dir=tmp_path / "cache")
    write_shards(tmp_path, [*TEXTS], shards=1)
    state = json.loads(json.dumps(opened.state_dict(progress)))
    with pytest.raises(DataError, match=r"--token-column\) was text \(tokens\), is text:"):
        open_stream(
            replace(options, token_column=None, data_glob=f"{tmp_path}/000*"),
            tokenizer,
            saved_position=opened.position_dict(progress),
            saved_state=state,
        )
