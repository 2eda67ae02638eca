"""Whole row groups in memory: read at once, and kept as long as the corpus is small."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argonne.data.shuffled import KeptGroups, WholeGroup, read_group
from argonne.data.texts import LongText, ShardError, TextBatch
from argonne.data.token_rows import TokenRow


def reader(rows: int, *batches: TextBatch) -> Any:
    return SimpleNamespace(group_rows=(0, rows), batches=lambda group: iter(batches if group == 1 else ()))


def group(*texts: Any) -> WholeGroup:
    return WholeGroup(list(texts), frozenset())


def test_batches_of_a_group_are_one_with_their_own_numbers() -> None:
    long = LongText(b"long")
    found = read_group(
        reader(
            5, TextBatch(["one", None], frozenset({0})), TextBatch(["zwei", "fünf", long], frozenset({1}))
        ),
        1,
    )
    assert found.texts == [b"one", None, b"zwei", "fünf".encode(), long]
    assert found.replaced == {0, 3}


def test_ids_are_copied_out_of_what_was_read() -> None:
    ids = np.arange(4, dtype=np.int32)
    found = read_group(reader(1, TextBatch([TokenRow(ids[1:], is_block=True)], frozenset())), 1)
    ids[:] = 0
    (row,) = found.texts
    assert isinstance(row, TokenRow) and row.ids.tolist() == [1, 2, 3] and row.is_block


@pytest.mark.parametrize("rows", [1, 3])
def test_a_group_of_another_length_than_its_footer_says(rows: int) -> None:
    with pytest.raises(ShardError, match="fewer rows than its footer says"):
        read_group(reader(rows, TextBatch(["a", "b"], frozenset())), 1)


def test_a_small_corpus_is_kept_whole() -> None:
    kept = KeptGroups(largest_cost=20, row_cost=3)
    kept.add(0, 0, group(b"1234", b"567"))  # 7 bytes and 2 rows: 13
    assert not kept.holds(0, 2) and kept.holds(0, 1)
    kept.add(0, 1, group(b"1234"))  # and 7: 20, as much as there may be
    assert kept.holds(0, 2) and kept.holds(5, 0)
    found = kept.get(0, 1)
    assert found is not None and found.texts == [b"1234"] and kept.get(1, 0) is None


def test_a_byte_more_and_all_of_it_goes_for_good() -> None:
    kept = KeptGroups(largest_cost=20, row_cost=3)
    kept.add(0, 0, group(b"1234", b"567"))
    kept.add(0, 1, group(b"12345"))
    assert kept.get(0, 0) is None and not kept.holds(0, 1)
    kept.add(1, 0, group(b""))
    assert kept.get(1, 0) is None


def test_a_group_counts_once() -> None:
    kept = KeptGroups(largest_cost=20, row_cost=3)
    for _ in range(5):
        kept.add(0, 0, group(b"1234", b"567"))
    assert kept.holds(0, 1)


def test_nulls_cost_a_row_ids_four_bytes_and_a_long_text_everything() -> None:
    kept = KeptGroups(largest_cost=3 + 3 + 8, row_cost=3)
    kept.add(0, 0, group(None, TokenRow(np.zeros(2, np.int32))))
    assert kept.holds(0, 1)
    kept = KeptGroups(largest_cost=3 + 3 + 7, row_cost=3)
    kept.add(0, 0, group(None, TokenRow(np.zeros(2, np.int32))))
    assert not kept.holds(0, 1)
    kept = KeptGroups(largest_cost=10**9, row_cost=3)
    kept.add(0, 0, group(LongText(b"")))
    assert not kept.holds(0, 1)
