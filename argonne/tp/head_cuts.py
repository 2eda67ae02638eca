"""Which heads a rank has: query heads in shares as equal as can be, key/value heads as these need them.

A head may be stored wider than it is, each half padded behind its own end (``argonne.tp.padded_heads``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from argonne.tp.slices import Cut, Piece


def head_range(num_heads: int, tp_size: int, tp_rank: int) -> range:
    """The query heads of one rank: shares that differ by one head at most, in order.

    The bounds lie where an even division would, rounded down, so that they fall between the groups of shared
    key/value heads wherever they can: 12 heads on 8 ranks are 1, 2, 1, 2, ...
    """
    return range(tp_rank * num_heads // tp_size, (tp_rank + 1) * num_heads // tp_size)


def _pieces(heads: range, first_held: int, owned: bool, head_dim: int, stored_dim: int) -> Iterator[Piece]:
    """Of neighbouring heads, on a rank whose first head is ``first_held``: one run, or all their halves."""
    if heads and stored_dim == head_dim:
        yield Piece(
            start=heads.start * head_dim,
            size=len(heads) * head_dim,
            local_start=(heads.start - first_held) * head_dim,
            owned=owned,
        )
    elif heads:
        for half in range(2 * heads.start, 2 * heads.stop):
            yield Piece(
                start=half * head_dim // 2,
                size=head_dim // 2,
                local_start=half * stored_dim // 2 - first_held * stored_dim,
                owned=owned,
            )


@lru_cache(maxsize=256)
def head_cut(
    num_heads: int,
    head_dim: int,
    tp_size: int,
    dimension: int,
    *,
    query_heads: int | None = None,
    stored_dim: int | None = None,
) -> Cut:
    """Whole heads per rank: ``head_range``, or for key/value heads those that the rank's query heads need.

    ``stored_dim`` (head_dim): extent of a head in the local tensor, both of them even where it is larger.

    A head that several ranks need is copied to each, and owned by the first. Without ``query_heads`` there
    are as many as heads, or as ranks where these are more. Raises ValueError for more ranks than query heads
    and for heads that do not share them evenly; callers check degrees (``argonne.tp.plan.check_degree``).
    """
    queries = query_heads or max(num_heads, tp_size)
    if queries % num_heads or queries < tp_size:
        raise ValueError(f"{num_heads} heads of {queries} query heads cannot be laid over {tp_size} ranks")
    group, stored_dim = queries // num_heads, stored_dim or head_dim
    needed = []
    for tp_rank in range(tp_size):
        own = head_range(queries, tp_size, tp_rank)
        needed.append(range(own[0] // group, own[-1] // group + 1))
    pieces = []
    held = 0
    for heads in needed:
        split = max(heads.start, held)  # the first may be another rank's: those behind it are new
        parts = ((heads.start, split, False), (split, heads.stop, True))
        pieces.append(
            tuple(
                piece
                for first, stop, owned in parts
                for piece in _pieces(range(first, stop), heads.start, owned, head_dim, stored_dim)
            )
        )
        held = heads.stop
    return Cut(
        dimension=dimension,
        local_sizes=tuple(len(heads) * stored_dim for heads in needed),
        pieces=tuple(pieces),
        sharers=max(sum(head in heads for heads in needed) for head in range(num_heads)),
    )
