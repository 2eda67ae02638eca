"""Rows of an unsharded tensor: the chunks in which it is read, sent and written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from argonne.tp.slices import Rectangle

CHUNK_BYTES = 32 << 20
"""Of a checkpoint that is written: what its writers put together at a time, all of a node at once."""


def row_chunks(shape: Sequence[int], chunk_bytes: int | None = None) -> list[tuple[int, int]]:
    """First row and last row + 1 of each chunk of a float32 tensor of this shape.

    A chunk has about ``chunk_bytes`` (default: CHUNK_BYTES), at least one row.
    """
    rows = max(1, (chunk_bytes or CHUNK_BYTES) // max(1, math.prod(shape[1:]) * 4))
    return [(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]


def clip_rows(rectangles: Sequence[Rectangle], first: int, last: int) -> list[tuple[Rectangle, int, int]]:
    """The rectangles that reach into rows ``first`` to ``last``, with the rows of each that do."""
    clipped = []
    for rectangle in rectangles:
        low = max(first, rectangle.start[0])
        high = min(last, rectangle.start[0] + rectangle.size[0])
        if low < high and rectangle.numel:
            clipped.append((rectangle, low, high))
    return clipped


def local_part(local: torch.Tensor, rectangle: Rectangle, low: int, high: int) -> torch.Tensor:
    """The part of a local tensor that holds unsharded rows ``low`` to ``high`` of a rectangle."""
    return local.detach()[local_index(rectangle, low, high)]


def local_index(rectangle: Rectangle, low: int, high: int) -> tuple[slice, ...]:
    """Where in the local tensor unsharded rows ``low`` to ``high`` of a rectangle lie."""
    shift = rectangle.local_start[0] - rectangle.start[0]
    return (slice(low + shift, high + shift), *rectangle.local_index[1:])
