"""Pieces: every byte once, in the order of the file, in rounds that fit a window."""

import math
from collections import Counter

import pytest

from argonne.checkpoint import rows
from argonne.checkpoint.contents import TensorEntry, tensor_entries
from argonne.checkpoint.pieces import Piece, in_rounds, plan_pieces, round_room

MEGABYTE = 1 << 20
SHAPES = {
    "embedding": (32_000, 1024),
    "norm": (1024,),
    "wide": (3, 20 * MEGABYTE),
    "matrix": (2816, 1024),
    "scale": (1,),
}


def entries() -> list[TensorEntry]:
    return tensor_entries(SHAPES, with_adam=True)


def _bytes_of_rounds(plan: dict[int, list[Piece]]) -> Counter[tuple[int, int]]:
    return Counter(
        {
            (writer, number): sum(piece.size for piece in pieces if piece.round == number)
            for writer, pieces in plan.items()
            for number in {piece.round for piece in pieces}
        }
    )


@pytest.mark.parametrize("writers", [[0], [0, 1], [0, 2, 3, 5], list(range(8)), list(range(11))])
def test_every_row_once_and_in_order(writers: list[int]) -> None:
    plan = plan_pieces(entries(), writers)
    assert list(plan) == writers
    pieces = [piece for writer in writers for piece in plan[writer]]
    assert all(piece.writer == writer for writer in writers for piece in plan[writer])
    for index, entry in enumerate(entries()):
        own = [piece for piece in pieces if piece.index == index]
        assert [piece.first for piece in own] == [0, *(piece.last for piece in own[:-1])]
        assert own[-1].last == entry.shape[0] and all(piece.entry == entry for piece in own)
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)
    rounds = in_rounds(plan)
    for number, one in enumerate(rounds):
        assert one and all(piece.round == number for piece in one)
    assert sum(map(len, rounds)) == len(pieces)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 11])
def test_a_round_fits_its_windows_and_is_well_filled(count: int) -> None:
    """32 MiB of all writers together, 4 MiB of each, or the one row that is longer."""
    plan = plan_pieces(entries(), range(count))
    longest = 4 * 20 * MEGABYTE
    limit = max(4 * MEGABYTE, rows.CHUNK_BYTES // count)
    for (writer, number), size in _bytes_of_rounds(plan).items():
        pieces = [piece for piece in plan[writer] if piece.round == number]
        assert [piece.place for piece in pieces] == [
            sum(before.size for before in pieces[:position]) for position in range(len(pieces))
        ]
        assert size <= limit or (len(pieces) == 1 and size == longest)
        assert size <= round_room(entries())
    total = sum(entry.size for entry in entries())
    assert len(in_rounds(plan)) <= math.ceil(2 * total / (count * limit))


def test_the_longest_row_is_the_room() -> None:
    assert round_room(entries()) == 4 * 20 * MEGABYTE
    assert round_room(tensor_entries({"norm": (1024,)}, with_adam=False)) == rows.CHUNK_BYTES
