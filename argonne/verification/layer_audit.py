"""One block of a training step against the same block unsharded, in a wider dtype: ``--audit-interval``.

What the split gave lies on its ranks (``argonne.verification.block_tap``). One rank, the oracle, gathers the
slices of the block's weights and, a sequence at a time, what went in: hidden states and the gradient at the
output. It takes them through the plain block twice (``argonne.verification.plain_blocks``): in a wider dtype,
which is the truth, and in the run's own, whose distance from the truth is what rounding alone does. A rank
whose numbers are further off than FACTOR times that distance did not merely round.

Distances are taken row by row (a token's hidden states, a row of a weight): one wrong row stands out, however
many right ones are beside it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from argonne.ranks.world import Parallel
from argonne.verification.block_tap import ACTIVATIONS, BlockTap
from argonne.verification.compare import relative_error, tp_local
from argonne.verification.plain_blocks import PlainBlocks
from model import ArgonneModel, document_starts
from tp_shard import TensorParallelState

FACTOR = 8.0
"""A split adds up in other orders, and rounds each rank's partial sums once more than the plain block does:
up to 2.5 times its distance was seen over 4 ranks. What is wrong in a row is some per cent of it and more."""
LEAST_EPSILONS = 4.0
"""In units of the dtype's epsilon: the least limit, where the plain block happens to round luckily."""
CEILINGS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""The largest limit: a faulty oracle must not take its own fault for rounding."""
EQUAL = 1e-12
"""Limit of what ranks hold alike to the last bit: what goes into a block, and the gradient at its output."""
CLEAR = 2.0
"""How many times further off than every other rank one must be to be the one that is named."""
GIVEN, MADE = (ACTIVATIONS[0], ACTIVATIONS[2]), (ACTIVATIONS[1], ACTIVATIONS[3])


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One tensor, as some ranks have it, beside the truth."""

    tensor: str
    ranks: tuple[int, ...]
    """World ranks whose numbers these are; several where their parts were added up."""
    own: bool
    """Whether the rank made it from what it holds, and not from a sum over the ranks."""
    error: float
    """Of its worst row, relative: ||row - truth|| / max(||truth||, root mean square of the rows' norms)."""
    limit: float

    @property
    def excess(self) -> float:
        """In units of the limit: above 1 it is off."""
        return min(self.error / self.limit, sys.float_info.max)


@dataclass(kw_only=True)
class _RowErrors:
    """The worst row so far, and of the plain block in the run's dtype the worst one."""

    actual: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """By world ranks."""
    rounding: list[Tensor] = field(default_factory=list)

    def add(self, ranks: tuple[int, ...], actual: Tensor, rough: Tensor, truth: Tensor) -> None:
        """Rows of the last dimension, of equal shape."""
        error = worst_row(actual, truth)
        self.actual[ranks] = torch.maximum(self.actual.get(ranks, error), error)
        self.rounding.append(worst_row(rough, truth))

    def compared(self, tensor: str, least: float, ceiling: float, *, own: bool) -> list[Compared]:
        """``least`` and ``ceiling``: bounds of the limit; ``own``: as `Compared` has it."""
        rounding = torch.stack(self.rounding).max().item()
        limit = max(least, min(FACTOR * rounding, ceiling)) if math.isfinite(rounding) else least
        return [
            Compared(
                tensor=tensor,
                ranks=ranks,
                own=own,
                error=relative_error(error.item(), 1.0, 1.0),
                limit=limit,
            )
            for ranks, error in self.actual.items()
        ]


def worst_row(actual: Tensor, truth: Tensor) -> Tensor:
    """0-d: the largest relative error of a row; NaN or infinite where a number is."""
    width = truth.shape[-1]
    rows = truth.reshape(-1, width)
    error = (actual.reshape(-1, width).to(rows.dtype) - rows).norm(dim=-1)
    norms = rows.norm(dim=-1)
    usual = norms.square().mean().sqrt()
    # 0 / 0 is no error: nothing where nothing was to be.
    relative = torch.where(error == 0, 0.0, error / torch.maximum(norms, usual))
    return relative.max()


class LayerAudit:
    """Compares what a complete ``tap`` has kept with the recomputation on one rank of each replica.

    ``slice_map``, ``group`` and all collectives are the tensor-parallel group's; they are not counted as the
    step's. Memory beside the tap's, on the oracle: the block's weights four times in the wide dtype (both
    blocks and their gradients), the activations of one sequence, one tensor of all ranks.
    """

    def __init__(self, model: ArgonneModel, tap: BlockTap, parallel: Parallel, dtype: torch.dtype) -> None:
        self._state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
        self._model, self._tap, self._parallel, self._dtype = model, tap, parallel, dtype
        self._ceiling = CEILINGS[dtype]
        self._least = LEAST_EPSILONS * torch.finfo(dtype).eps

    def compare(self, oracle: int) -> list[Compared]:
        """What tensor-parallel rank ``oracle`` found out; nothing on the others. Collective."""
        weights = {name: self._whole_weight(name, oracle) for name in self._tap.parameters}
        blocks = None
        if self._parallel.tp_rank == oracle:
            blocks = PlainBlocks(self._model, self._tap.index, weights, self._dtype)
        found = self._compare_sequences(blocks, oracle)
        for name in self._tap.parameters:
            truth = None if blocks is None else blocks.gradients(name)
            found += self._compare_gradient(name, truth, oracle)
        return found

    # ---------------------------------------------------------------- gathering

    def _gather(self, local: Tensor, oracle: int, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Each rank's tensor, flat, on the oracle; nothing elsewhere. ``sizes``: of each rank's."""
        parallel = self._parallel
        if parallel.tp_size == 1 or parallel.tp_group is None:
            return [local.reshape(-1)]
        # In float32, which any backend takes; 16 bits lose nothing in it.
        sent = local.reshape(-1).to(torch.promote_types(local.dtype, torch.float32))
        sizes = sizes or [sent.numel()] * parallel.tp_size
        if len(sent) < max(sizes):
            sent = torch.cat([sent, sent.new_zeros(max(sizes) - len(sent))])
        here = parallel.tp_rank == oracle
        parts = [torch.empty_like(sent) for _ in sizes] if here else None
        dist.gather(sent.contiguous(), parts, group=parallel.tp_group, group_dst=oracle)
        return [part[:size] for part, size in zip(parts or [], sizes, strict=False)]

    def _slices(self, name: str, local: Tensor, oracle: int) -> list[Tensor]:
        """Every rank's slice of a parameter, or of its gradient, in its shape."""
        slice_map = self._state.slice_map
        shapes = [slice_map.tp_local_shape(self._tap.prefix + name, r) for r in range(slice_map.tp_size)]
        parts = self._gather(local, oracle, [torch.Size(shape).numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]

    def _whole_weight(self, name: str, oracle: int) -> Tensor | None:
        slice_map, full = self._state.slice_map, self._tap.prefix + name
        parts = self._slices(name, tp_local(self._tap.weights[name]), oracle)
        if not parts:
            return None
        whole = parts[0].new_full(slice_map.shape(full), torch.nan)
        for rank, part in enumerate(parts):
            for box in slice_map.owned(full, rank):
                whole[box.unsharded_index] = part[box.local_index]
        return whole

    # ---------------------------------------------------------------- activations

    def _compare_sequences(self, blocks: PlainBlocks | None, oracle: int) -> list[Compared]:
        """Every sequence of the micro-batch through both blocks."""
        errors = {name: _RowErrors() for name in ACTIVATIONS}
        starts = self._tap.document_ids
        for sequence in range(len(self._tap.activations["input"])):
            given = {name: self._sequence(name, sequence, oracle) for name in ACTIVATIONS}
            if blocks is None:
                continue
            documents = None if starts is None else document_starts(starts[sequence : sequence + 1])
            entered, arrived = (self._joined(given[name]) for name in GIVEN)
            results = dict(zip(MADE, blocks.take(entered, arrived, documents), strict=True))
            results |= {name: (truth, truth) for name, truth in zip(GIVEN, (entered, arrived), strict=True)}
            for name, (truth, rough) in results.items():
                for rank, (first, part) in enumerate(self._positions(given[name])):
                    rows = slice(first, first + len(part))
                    errors[name].add((self._world_rank(rank),), part, rough[rows], truth[rows])
        if blocks is None:
            return []
        block, least = self._tap.prefix.rstrip("."), dict.fromkeys(GIVEN, EQUAL)
        return [
            one
            for name in ACTIVATIONS
            for one in errors[name].compared(
                f"{name} of {block}", least.get(name, self._least), self._ceiling, own=name in GIVEN
            )
        ]

    def _sequence(self, name: str, sequence: int, oracle: int) -> list[Tensor]:
        local = self._tap.activations[name][sequence]
        return [part.view(local.shape) for part in self._gather(local, oracle)]

    def _positions(self, parts: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Each rank's part, without padding, and the position at which it begins."""
        sequence, first = self._state.sequence, 0
        for part in parts:
            if sequence.enabled:
                part = part[: max(0, sequence.seq_len - first)]
            yield first, part
            first += len(part) if sequence.enabled else 0

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """(seq_len, hidden_size): the parts in order, or what most ranks hold alike."""
        if self._state.sequence.enabled:
            return torch.cat([part for _, part in self._positions(parts)])
        alike = [sum(torch.equal(part, other) for other in parts) for part in parts]
        return parts[alike.index(max(alike))]

    def _world_rank(self, tp_rank: int) -> int:
        return self._parallel.rank - self._parallel.tp_rank + tp_rank

    # ---------------------------------------------------------------- gradients of weights

    def _compare_gradient(
        self, name: str, truth: tuple[Tensor, Tensor] | None, oracle: int
    ) -> list[Compared]:
        """Each rank's slice; where ranks have parts of a sum (norms on heads, shared heads), the sum."""
        slice_map, full = self._state.slice_map, self._tap.prefix + name
        parts = self._slices(name, self._tap.gradients[name], oracle)
        if truth is None:
            return []
        exact, rough = truth
        errors = _RowErrors()
        if full in self._state.summed or full in self._state.shared:
            total = torch.zeros_like(exact)
            for rank, part in enumerate(parts):
                for box in slice_map.rectangles(full, rank):
                    total[box.unsharded_index] += part[box.local_index].to(total.dtype)
            ranks = tuple(self._world_rank(rank) for rank in range(len(parts)))
            errors.add(ranks, total, rough, exact)
        else:
            for rank, part in enumerate(parts):
                for box in slice_map.rectangles(full, rank):
                    inside = box.unsharded_index
                    actual = part[box.local_index]
                    errors.add((self._world_rank(rank),), actual, rough[inside], exact[inside])
        own = len(next(iter(errors.actual))) == 1
        return errors.compared(f"gradient of {full}", self._least, self._ceiling, own=own)


def furthest(found: Sequence[Compared]) -> Compared:
    """What to name of all comparisons: what is off, on the rank where it is most; else the nearest to it.

    A wrong partial sum is everyone's after its reduction. So what tells ranks apart goes first: what went in,
    then the gradient of a weight in which one rank stands out from the others, then its hidden states.
    """
    off = [one for one in found if one.excess > 1.0]
    if not off:
        return max(found, key=lambda one: one.excess)
    entered = [one for one in off if one.limit == EQUAL]
    if entered:
        return _first(entered)
    by_tensor = [
        [other for other in off if other.tensor == one] for one in dict.fromkeys(o.tensor for o in off)
    ]
    for own in (True, False):
        tensors = [ones for ones in by_tensor if ones[0].own == own]
        clearest = max(tensors, key=lambda ones: (_contrast(ones, found), _first(ones).excess), default=None)
        if clearest is not None and _contrast(clearest, found) >= CLEAR:
            return _first(clearest)
    worst = max(by_tensor, key=lambda ones: _first(ones).excess)
    return replace(_first(worst), ranks=tuple(sorted({rank for one in worst for rank in one.ranks})))


def _first(ones: Sequence[Compared]) -> Compared:
    return max(ones, key=lambda one: one.excess)


def _contrast(off: Sequence[Compared], found: Sequence[Compared]) -> float:
    """How much further off the first rank is than the second; 1 where there is no second."""
    if sum(one.tensor == off[0].tensor for one in found) < 2:
        return 1.0
    excesses = sorted((one.excess for one in off), reverse=True)
    return excesses[0] / (excesses[1] if len(excesses) > 1 else 1.0)
