"""Which heads a rank has: query heads in shares as equal as can be, key/value heads as these need them."""

from __future__ import annotations

from functools import lru_cache

from argonne.tp.slices import Cut, Piece


def head_range(num_heads: int, tp_size: int, tp_rank: int) -> range:
    """The query heads of one rank: shares that differ by one head at most, in order.

    The bounds lie where an even division would, rounded down, so that they fall between the groups of shared
    key/value heads wherever they can: 12 heads on 8 ranks are 1, 2, 1, 2, ...
    """
    return range(tp_rank * num_heads // tp_size, (tp_rank + 1) * num_heads // tp_size)


@lru_cache(maxsize=256)
def head_cut(
    num_heads: int, head_dim: int, tp_size: int, dimension: int, *, query_heads: int | None = None
) -> Cut:
    """Whole heads per rank: ``head_range``, or for key/value heads those that the rank's query heads need.

    A head that several ranks need is copied to each, and owned by the first. Without ``query_heads`` there
    are as many as heads, or as ranks where these are more. Raises ValueError for more ranks than query heads
    and for heads that do not share them evenly; callers check degrees (``argonne.tp.plan.check_degree``).
    """
    queries = query_heads or max(num_heads, tp_size)
    if queries % num_heads or queries < tp_size:
        raise ValueError(f"{num_heads} heads of {queries} query heads cannot be laid over {tp_size} ranks")
    group = queries // num_heads
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
                Piece(
                    start=first * head_dim,
                    size=(stop - first) * head_dim,
                    local_start=(first - heads.start) * head_dim,
                    owned=owned,
                )
                for first, stop, owned in parts
                if first < stop
            )
        )
        held = heads.stop
    return Cut(
        dimension=dimension,
        local_sizes=tuple(len(heads) * head_dim for heads in needed),
        pieces=tuple(pieces),
        sharers=max(sum(head in heads for heads in needed) for head in range(num_heads)),
    )
