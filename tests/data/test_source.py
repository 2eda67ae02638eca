"""The source of rank 0: its hash, its place in metrics and checkpoints, what it skips, where it goes on."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.data.documents import Counts, Document
from argonne.data.flat_tokens import BLOCK_TOKENS
from argonne.data.holdout import Holdout
from argonne.data.order import NaturalOrder, ShuffledOrder
from argonne.data.position import DataPosition
from argonne.data.shards import Shard
from argonne.data.source import (
    NO_HASH,
    DataProgress,
    SingleSource,
    StreamingSource,
    TakenSamples,
    chain_hash,
    refuse_unencodable,
    unencodable_skip,
)
from argonne.data.token_rows import TokenColumn
from argonne.data.token_stream import open_shards
from argonne.errors import DataError
from argonne.testing.sources import source_options
from tests.data.token_samples import write_flat

EOS = 7
PLACE = DataPosition(epoch=1, file_index=2, file_name="c.parquet", row=5, token_offset=9, block_size=8)


def shard(name: str, *groups: int) -> Shard:
    path = Path("data", name)
    return Shard(path=path, name=name, size=1, mtime_ns=1, digest="", group_rows=groups)


def test_the_hash_is_blake2b_over_each_sample_in_turn() -> None:
    tokens = np.array([[1, 2, 3], [70_000, 5, 6]], dtype=np.int32)
    digest = bytes(16)
    for sample in tokens.tolist():
        packed = b"".join(token.to_bytes(4, "little") for token in sample)
        digest = hashlib.blake2b(digest + packed, digest_size=16).digest()
    assert chain_hash(NO_HASH, tokens) == digest.hex()
    assert chain_hash(chain_hash(NO_HASH, tokens[:1]), tokens[1:]) == digest.hex()
    assert chain_hash(NO_HASH, tokens.astype(np.int64)) == digest.hex()
    assert chain_hash(NO_HASH, np.asfortranarray(tokens)) == digest.hex()
    assert chain_hash(NO_HASH, tokens[::-1]) != digest.hex()


def test_the_options_say_what_is_read_and_in_which_order() -> None:
    options = source_options("a/*")
    assert (options.column, options.part) == ("text", None) and isinstance(options.order, NaturalOrder)
    tokens = replace(options, token_column="ids", vocab_size=50, shuffle=True, seed=3, holdout=10)
    column = tokens.column
    assert isinstance(column, TokenColumn) and (column, column.vocab_size) == ("ids", 50)
    assert tokens.order == ShuffledOrder(3)
    assert tokens.part == Holdout(every=10, held_out=False)
    assert replace(tokens, held_out=True).part == Holdout(every=10, held_out=True)


def test_a_line_of_the_metrics_has_hash_counts_and_place() -> None:
    progress = DataProgress(
        position=PLACE, stream_hash="ab", samples=4, counts=Counts(documents=3, null_rows=1)
    )
    assert progress.metrics() == {
        "stream_hash": "ab",
        **Counts(documents=3, null_rows=1)._asdict(),
        "data_position": {"epoch": 1, "file_name": "c.parquet", "row": 5, "token_offset": 9},
    }
    skipped = replace(progress, skipped=({"row": 1}, {"row": 2}))
    assert skipped.metrics()["skipped_row_groups"] == 2
    shuffled = replace(progress, position=DataPosition(epoch=2, sample=6))
    assert shuffled.metrics()["data_position"] == {"epoch": 2, "streaming": False, "current_position": 6}


def test_a_checkpoint_has_the_state_and_the_files_so_far() -> None:
    progress = DataProgress(position=PLACE, samples=4, skipped=({"row": 1},))
    state = progress.state_dict({"": {"names": ["a"]}})
    assert (state["stream_hash"], state["samples"], state["manifest"]) == (NO_HASH, 4, {"names": ["a"]})
    assert state["skipped"] == [{"row": 1}] and state["counts"] == Counts()._asdict()
    position = progress.position_dict({"": ["a.parquet", "b.parquet", "c.parquet", "d.parquet"]})
    assert position["files_processed"] == ["a.parquet", "b.parquet", "c.parquet"]
    assert progress.positions == {"": PLACE}


def test_a_row_that_cannot_be_encoded_is_an_error_or_an_entry() -> None:
    shards = [shard("a.parquet", 4), shard("b.parquet", 3, 3)]
    document = Document(2, 1, 4, "", Counts(), 0)
    said = r"^the tokenizer cannot encode .*b\.parquet, row 4: no id for x: give .* or --skip-bad-shards"
    with pytest.raises(DataError, match=said):
        refuse_unencodable(document, "no id for x", shards, skip_bad=False)
    refuse_unencodable(document, "no id for x", shards, skip_bad=True)
    assert unencodable_skip(document, "no id for x", shards) == {
        "epoch": 2,
        "file_name": "b.parquet",
        "row_group": 1,
        "row": 4,
        "rows": 1,
        "reason": "no id for x",
    }


def test_steps_chain_the_hash_that_the_source_began_with() -> None:
    class Counting:
        """Samples of two tokens in a row."""

        progress = DataProgress(position=PLACE, stream_hash="01" * 16, samples=10)
        closed = False

        def take(self, count: int) -> TakenSamples:
            first = self.progress.samples
            self.progress = replace(self.progress, samples=first + count)
            tokens = np.arange(first, first + count, dtype=np.int32)[:, None] + np.arange(2, dtype=np.int32)
            return TakenSamples(tokens)

        def close(self) -> None:
            self.closed = True

    counting = Counting()
    source = SingleSource(counting, 3)
    one, two = source.next_step(), source.next_step()
    assert one.tokens.tolist() == [[10, 11], [11, 12], [12, 13]] and two.tokens[0].tolist() == [13, 14]
    assert (one.progress.samples, two.progress.samples) == (13, 16)
    assert one.progress.stream_hash == chain_hash("01" * 16, one.tokens)
    assert two.progress.stream_hash == chain_hash(one.progress.stream_hash, two.tokens)
    assert one.starts is None and one.sources is None
    source.close()
    assert counting.closed


@pytest.mark.parametrize("document_attention", [False, True])
def test_a_flat_source_goes_on_in_its_second_block(tmp_path: Path, document_attention: bool) -> None:
    ids = np.random.default_rng(0).integers(8, 500, BLOCK_TOKENS + 60)
    ids[[3, BLOCK_TOKENS + 9]] = EOS
    write_flat(tmp_path / "a.bin", ids)
    asked = source_options(f"{tmp_path}/*.bin", document_attention=document_attention)
    options, shards = open_shards(asked)
    whole: Any = StreamingSource(shards, None, options, DataProgress(position=start(0)), eos=EOS)
    first = whole.take(2)
    assert first.tokens.tolist() == [ids[:9].tolist(), ids[8:17].tolist()]
    assert whole.progress.position == start(16) and whole.progress.samples == 2
    marked = np.zeros((2, 8), dtype=bool)
    marked[0, [0, 4]] = True
    assert first.starts is None if not document_attention else (first.starts == marked).all()
    later: Any = StreamingSource(
        shards, None, options, DataProgress(position=start(BLOCK_TOKENS + 4), samples=9), eos=EOS
    )
    assert later.take(1).tokens[0].tolist() == ids[BLOCK_TOKENS + 4 : BLOCK_TOKENS + 13].tolist()
    assert later.progress.position == start(BLOCK_TOKENS + 12) and later.progress.samples == 10
    whole.close()


def start(token: int) -> DataPosition:
    """A position in the only file, as it is saved."""
    return DataPosition(file_name="a.bin", token_offset=token, block_size=8)
