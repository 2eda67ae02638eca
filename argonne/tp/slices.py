"""The slice map: which rectangles of which unsharded parameter each rank holds.

Whatever needs to know where an element lives asks this map: splitting, initial values, gathering, clipping,
checkpoints and tests. It is a pure function of the unsharded shapes, the way one dimension of
each parameter is cut, and the parallel degrees, so every rank can answer for every other rank without
communication. Nothing else computes offsets.

Ranks here are world ranks: ``rank = dp_rank * tp_size + tp_rank``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A box of an unsharded parameter and the place of the same box in one rank's local tensor."""

    name: str
    """Unsharded parameter name."""
    start: Shape
    """First index in the unsharded parameter, per dimension."""
    size: Shape
    """Extent per dimension."""
    local_start: Shape
    """First index in the local tensor, per dimension."""
    owned: bool
    """Whether this rank is the one owner of these elements (copies elsewhere are not)."""

    @property
    def unsharded_index(self) -> tuple[slice, ...]:
        """Index of the box in the unsharded parameter."""
        return tuple(
            slice(first, first + extent) for first, extent in zip(self.start, self.size, strict=True)
        )

    @property
    def local_index(self) -> tuple[slice, ...]:
        """Index of the box in the local tensor."""
        return tuple(
            slice(first, first + extent) for first, extent in zip(self.local_start, self.size, strict=True)
        )

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.size)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of indices along the cut dimension, held by one tensor-parallel rank."""

    start: int
    size: int
    local_start: int
    owned: bool = True


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one dimension of a parameter is divided over the tensor-parallel ranks."""

    dimension: int
    local_sizes: tuple[int, ...]
    """Extent of the cut dimension on each tensor-parallel rank, padding included."""
    pieces: tuple[tuple[Piece, ...], ...]
    """What each tensor-parallel rank holds; indices in no piece of a rank's local extent are padding."""
    sharers: int = 1
    """How many tensor-parallel ranks at most hold the same elements (copied key/value heads)."""

    @property
    def is_padded(self) -> bool:
        """Whether some slice is filled up with zeros."""
        held = [sum(piece.size for piece in pieces) for pieces in self.pieces]
        return held != list(self.local_sizes)

    @cached_property
    def shares_evenly(self) -> bool:
        """Whether ranks form runs of ``sharers`` that hold the same slice and share with no other run."""
        held = [tuple((piece.start, piece.size) for piece in pieces) for pieces in self.pieces]
        runs = [held[first : first + self.sharers] for first in range(0, len(held), self.sharers)]
        alike = all(len(run) == self.sharers and len(set(run)) == 1 for run in runs)
        sizes = [size for run in runs for _, size in run[0]]
        return alike and sum(sizes) == sum(p.size for pieces in self.pieces for p in pieces if p.owned)


def padded_slice_size(size: int, tp_size: int) -> int:
    """Local extent of ``size`` elements divided over ``tp_size`` ranks, padded where they do not divide.

    Large slices are rounded up to a multiple of 8, which keeps matrix rows aligned for tensor cores at
    less than one percent of padding.
    """
    local = -(-size // tp_size)
    if size % tp_size and local >= 1024:
        local = -(-local // 8) * 8
    return local


def even_cut(size: int, tp_size: int, dimension: int) -> Cut:
    """Contiguous slices of equal local extent; the last ones are padded where ``tp_size`` does not divide."""
    local = padded_slice_size(size, tp_size)
    pieces: list[tuple[Piece, ...]] = []
    for tp_rank in range(tp_size):
        start = min(tp_rank * local, size)
        held = min(start + local, size) - start
        pieces.append((Piece(start=start, size=held, local_start=0),) if held else ())
    return Cut(dimension=dimension, local_sizes=(local,) * tp_size, pieces=tuple(pieces))


def fused_cut(parts: Sequence[Cut], part_sizes: Sequence[int]) -> Cut:
    """Several parts stored one after the other in one parameter (a fused query-key-value), each cut alone.

    ``part_sizes`` are the unsharded extents of the parts along the common dimension.
    """
    tp_size = len(parts[0].local_sizes)
    pieces: list[list[Piece]] = [[] for _ in range(tp_size)]
    local_sizes = [0] * tp_size
    offset = 0
    for part, part_size in zip(parts, part_sizes, strict=True):
        for tp_rank in range(tp_size):
            pieces[tp_rank] += [
                replace(
                    piece, start=piece.start + offset, local_start=piece.local_start + local_sizes[tp_rank]
                )
                for piece in part.pieces[tp_rank]
            ]
            local_sizes[tp_rank] += part.local_sizes[tp_rank]
        offset += part_size
    return Cut(
        dimension=parts[0].dimension,
        local_sizes=tuple(local_sizes),
        pieces=tuple(tuple(rank_pieces) for rank_pieces in pieces),
        sharers=max(part.sharers for part in parts),
    )


class SliceMap:
    """Where each element of each unsharded parameter lies, for all ranks.

    ``parameters`` maps unsharded names, in the order of ``model.parameters()``, to (shape, cut), the cut
    being None for a parameter that every tensor-parallel rank holds whole. With ``dp_sharded`` (FSDP) the
    local tensor of a tensor-parallel rank is cut again into row chunks over the data-parallel ranks, as
    ``torch.chunk`` does along dimension 0; with ``shard_size``, over so many neighbouring ones, of which the
    next hold copies.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[Shape, Cut | None]],
        *,
        tp_size: int,
        dp_size: int = 1,
        dp_sharded: bool = False,
        shard_size: int | None = None,
    ) -> None:
        self._parameters = {name: (tuple(shape), cut) for name, (shape, cut) in parameters.items()}
        self.tp_size = tp_size
        self.dp_size = dp_size
        self.dp_sharded = dp_sharded and dp_size > 1
        self.shard_size = (shard_size or dp_size) if self.dp_sharded else 1

    @property
    def names(self) -> tuple[str, ...]:
        """Unsharded parameter names in optimizer order (a tied head counts once, as the embedding)."""
        return tuple(self._parameters)

    @property
    def world_size(self) -> int:
        """Ranks that the map is laid over."""
        return self.tp_size * self.dp_size

    def with_data_parallel(self, dp_size: int, *, sharded: bool, shard_size: int | None = None) -> SliceMap:
        """The same tensor-parallel cuts laid over ``dp_size`` replicas, of which ``shard_size`` share."""
        return SliceMap(
            self._parameters, tp_size=self.tp_size, dp_size=dp_size, dp_sharded=sharded, shard_size=shard_size
        )

    @property
    def replicated(self) -> bool:
        """Whether replicas hold copies of each other's weights."""
        return self.dp_size > self.shard_size

    def shape(self, name: str) -> Shape:
        """Unsharded shape."""
        return self._parameters[name][0]

    def cut(self, name: str) -> Cut | None:
        """How the parameter is cut over the tensor-parallel ranks; None where each holds it whole."""
        return self._parameters[name][1]

    @property
    def copied(self) -> tuple[str, ...]:
        """Parameters whose slices several tensor-parallel ranks hold alike: shared key/value heads."""
        return tuple(name for name, (_, cut) in self._parameters.items() if cut and cut.sharers > 1)

    @property
    def sharers(self) -> int:
        """How many tensor-parallel ranks at most hold the same key/value head; 1 where none is copied."""
        return max((cut.sharers for _, cut in self._parameters.values() if cut), default=1)

    @property
    def shares_evenly(self) -> bool:
        """Whether copied slices are whole slices of ``sharers`` neighbouring ranks each."""
        return all(cut.shares_evenly for name in self.copied if (cut := self.cut(name)) is not None)

    def copies(self, name: str) -> tuple[dict[int, Rectangle], ...]:
        """The parts of ``name`` that more than one world rank holds, each with its box by rank.

        Boxes are cut wherever one of them begins or ends, so that those of a part are the same elements.
        """
        boxes = [(rank, box) for rank in range(self.world_size) for box in self.rectangles(name, rank)]
        bounds = [
            sorted({edge for _, box in boxes for edge in (box.start[d], box.start[d] + box.size[d])})
            for d in range(len(self.shape(name)))
        ]
        parts = []
        for cell in itertools.product(*(itertools.pairwise(edges) for edges in bounds)):
            held = {rank: part for rank, box in boxes if (part := _within(box, cell)) is not None}
            if len(held) > 1:
                parts.append(held)
        return tuple(parts)

    def numel(self, names: Iterable[str] | None = None) -> int:
        """Number of unsharded elements, of all parameters or of those named."""
        return sum(math.prod(self.shape(name)) for name in (self.names if names is None else names))

    def tp_local_shape(self, name: str, tp_rank: int) -> Shape:
        """Shape of the slice on one tensor-parallel rank, before FSDP chunks it."""
        shape, cut = self._parameters[name]
        if cut is None:
            return shape
        return (*shape[: cut.dimension], cut.local_sizes[tp_rank], *shape[cut.dimension + 1 :])

    def local_shape(self, name: str, rank: int) -> Shape:
        """Shape of the tensor that world rank ``rank`` holds."""
        dp_rank, tp_rank = divmod(rank, self.tp_size)
        shape = self.tp_local_shape(name, tp_rank)
        if not self.dp_sharded:
            return shape
        first, last = self._chunk(shape[0], dp_rank)
        return (last - first, *shape[1:])

    def rectangles(self, name: str, rank: int) -> tuple[Rectangle, ...]:
        """All boxes of ``name`` that world rank ``rank`` holds, copies included; padding belongs to none."""
        dp_rank, tp_rank = divmod(rank, self.tp_size)
        boxes = self._tp_rectangles(name, tp_rank)
        if self.dp_sharded:
            rows = self._chunk(self.tp_local_shape(name, tp_rank)[0], dp_rank)
            boxes = tuple(chunk for box in boxes if (chunk := _intersect_rows(box, *rows)) is not None)
        if dp_rank >= self.shard_size:
            return tuple(replace(box, owned=False) for box in boxes)
        return boxes

    def owned(self, name: str, rank: int) -> tuple[Rectangle, ...]:
        """The boxes of ``name`` that world rank ``rank`` owns."""
        return tuple(box for box in self.rectangles(name, rank) if box.owned)

    def _tp_rectangles(self, name: str, tp_rank: int) -> tuple[Rectangle, ...]:
        shape, cut = self._parameters[name]
        origin = (0,) * len(shape)
        if cut is None:
            return (Rectangle(name=name, start=origin, size=shape, local_start=origin, owned=tp_rank == 0),)
        dimension = cut.dimension
        return tuple(
            Rectangle(
                name=name,
                start=_with(origin, dimension, piece.start),
                size=_with(shape, dimension, piece.size),
                local_start=_with(origin, dimension, piece.local_start),
                owned=piece.owned,
            )
            for piece in cut.pieces[tp_rank]
        )

    def _chunk(self, rows: int, dp_rank: int) -> tuple[int, int]:
        chunk = -(-rows // self.shard_size)
        shard = dp_rank % self.shard_size
        return min(shard * chunk, rows), min((shard + 1) * chunk, rows)


def _with(values: Shape, index: int, value: int) -> Shape:
    return (*values[:index], value, *values[index + 1 :])


def _intersect_rows(box: Rectangle, first: int, last: int) -> Rectangle | None:
    """The part of ``box`` in local rows ``first`` to ``last``, its local rows counted from ``first``."""
    low = max(box.local_start[0], first)
    high = min(box.local_start[0] + box.size[0], last)
    if low >= high:
        return None
    return replace(
        box,
        start=_with(box.start, 0, box.start[0] + low - box.local_start[0]),
        size=_with(box.size, 0, high - low),
        local_start=_with(box.local_start, 0, low - first),
    )


def _within(box: Rectangle, cell: tuple[tuple[int, int], ...]) -> Rectangle | None:
    """The part of ``box`` in a cell ((first, stop) per dimension) that no box is cut by; None outside."""
    start = tuple(first for first, _ in cell)
    offsets = tuple(first - begin for first, begin in zip(start, box.start, strict=True))
    if not all(0 <= offset < extent for offset, extent in zip(offsets, box.size, strict=True)):
        return None
    return replace(
        box,
        start=start,
        size=tuple(stop - first for first, stop in cell),
        local_start=tuple(begin + offset for begin, offset in zip(box.local_start, offsets, strict=True)),
    )
