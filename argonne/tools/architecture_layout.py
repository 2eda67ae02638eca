"""What the architecture script shows, worked out once for text and picture: a model laid over the ranks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from argonne.errors import ConfigError
from argonne.tp.architectures import plan_for
from argonne.tp.costs import SplitCost, readable_bytes
from argonne.tp.plan import HeadCounts, Style, TensorParallelPlan, build_slice_map, stores_transposed
from argonne.tp.slices import SliceMap
from argonne.tp.strategies import all_splits


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One divided weight of a block, or the embedding or head."""

    name: str
    short: str
    style: Style
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dimension: int
    """The dimension that is cut, of the weight as it is stored."""
    is_copied: bool
    """Whether several ranks hold the same key/value heads."""
    is_padded: bool
    """Whether the last ranks' slices are filled up with zeros."""
    is_uneven: bool
    """Whether ranks hold different numbers of heads; ``local_shape`` is the largest slice."""

    @property
    def cut_of(self) -> str:
        """ "rows" or "columns" of the stored weight."""
        return "rows" if self.dimension == 0 else "columns"


@dataclass(frozen=True, kw_only=True)
class Half:
    """Attention or MLP: a norm, an entrance, column layers, something in between, row layers, an exit, and
    with sandwich norms another norm."""

    title: str
    norm: str
    columns: tuple[Weight, ...]
    between: str
    rows: tuple[Weight, ...]
    head_norms: tuple[str, ...] = ()
    """Norms on the local heads of queries, keys and values."""
    out_norm: str | None = None
    """Norm on what comes out of the exit."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model on tp_size x dp_size ranks."""

    title: str
    subtitle: str
    tp_size: int
    dp_size: int
    sequence_parallel: bool
    hidden_size: int
    num_layers: int
    vocab_size: int
    tied: bool
    plan: TensorParallelPlan
    slice_map: SliceMap
    halves: tuple[Half, Half]
    embedding: Weight
    final_norm: str
    batch: tuple[int, int]
    splits: tuple[SplitCost, ...]

    @property
    def stream(self) -> str:
        """Shape of the residual stream on a rank."""
        length = f"seq_len / {self.tp_size}" if self.sequence_parallel and self.tp_size > 1 else "seq_len"
        return f"(batch, {length}, {self.hidden_size})"

    @property
    def entrance(self) -> tuple[str, str]:
        """What a block's entrance does forward and backward."""
        if self.tp_size == 1:
            return "identity", "identity"
        if not self.sequence_parallel:
            return "identity", "all-reduce"
        return "all-gather", "reduce-scatter, re-gather" if self.plan.seams else "reduce-scatter"

    @property
    def head_entrance(self) -> tuple[str, str]:
        """What happens before the head, which always gathers its input again under sequence parallelism."""
        if self.tp_size > 1 and self.sequence_parallel:
            return "all-gather", "reduce-scatter, re-gather"
        return self.entrance

    @property
    def block_traffic(self) -> tuple[str, str]:
        """Collectives of one block, forward and backward."""
        if self.tp_size == 1:
            return "nothing", "nothing"
        if not self.sequence_parallel:
            return "2 all-reduces", "2 all-reduces"
        return "2 gathers, 2 scatters", f"{4 if self.plan.seams else 2} gathers, 2 scatters"

    @property
    def exit(self) -> tuple[str, str]:
        """What a block's exit does forward and backward."""
        if self.tp_size == 1:
            return "identity", "identity"
        return ("reduce-scatter", "all-gather") if self.sequence_parallel else ("all-reduce", "identity")

    @property
    def embedding_exit(self) -> tuple[str, str]:
        """What happens after the embedding's look-up; transformers' models split the sequence later."""
        return self.exit if self.plan.embedding_splits_sequence or not self.sequence_parallel else (
            "all-reduce, then split", "all-gather")  # fmt: skip

    def replicas(self) -> str | None:
        """What data parallelism adds, in one line; None for one replica."""
        if self.dp_size == 1:
            return None
        held = self.splits[1 if self.sequence_parallel else 0].parameters_per_rank
        return (
            f"{self.dp_size} replicas (FSDP2): each rank keeps 1/{self.dp_size} of its slice, "
            f"{readable_bytes(16 * held / self.dp_size)} with gradient and Adam state; a step gathers its "
            f"slice block by block in 16 bit, forward and backward ({readable_bytes(2 * held)} each), and "
            f"reduce-scatters {readable_bytes(4 * held)} of gradients"
        )


def holders(layout: Layout, weight: Weight) -> list[tuple[tuple[int, int], list[int]]]:
    """((start, stop) along the cut dimension, tensor-parallel ranks that hold it), in order of start."""
    boxes = [
        (rank, box)
        for rank in range(layout.tp_size)
        for box in layout.slice_map.rectangles(weight.name, rank)
    ]
    along = [(rank, box.start[weight.dimension], box.size[weight.dimension]) for rank, box in boxes]
    edges = sorted({edge for _, start, size in along for edge in (start, start + size)})
    return [
        ((first, stop), [rank for rank, start, size in along if start <= first < start + size])
        for first, stop in pairwise(edges)
    ]


def _weights(model: nn.Module, plan: TensorParallelPlan, slice_map: SliceMap) -> list[Weight]:
    weights = []
    for name in slice_map.names:
        module_name, _, leaf = name.rpartition(".")
        rule = plan.rule_for(module_name)
        if leaf != "weight" or rule is None or rule.style in (Style.REPLICATED, Style.RESIDUAL, Style.SUMMED):
            continue
        cut = slice_map.cut(name)
        column = rule.style is not Style.ROW
        transposed = stores_transposed(model.get_submodule(module_name))
        weights.append(
            Weight(
                name=name,
                short=module_name.rpartition(".")[2],
                style=rule.style,
                shape=slice_map.shape(name),
                local_shape=max(slice_map.tp_local_shape(name, rank) for rank in range(slice_map.tp_size)),
                dimension=cut.dimension if cut else int(column == transposed),
                is_copied=cut is not None and cut.sharers > 1,
                is_padded=cut is not None and cut.is_padded,
                is_uneven=cut is not None and len(set(cut.local_sizes)) > 1,
            )
        )
    return weights


def _halves(
    plan: TensorParallelPlan, slice_map: SliceMap, weights: list[Weight], counts: str
) -> tuple[Half, Half]:
    """Attention and MLP of the first block; ``counts`` says how many heads a rank has."""
    prefix = f"{plan.first_block}."

    def part(pattern: str, style: Style) -> tuple[Weight, ...]:
        return tuple(
            weight
            for weight in weights
            if weight.name.startswith(prefix)
            and fnmatch.fnmatchcase(weight.name, f"{pattern}.*")
            and weight.style is style
        )

    def norms_of(style: Style) -> list[str]:
        modules = [
            name.rpartition(".")[0]
            for name in slice_map.names
            if name.startswith(prefix) and name.endswith("weight")
        ]
        rules = ((module, plan.rule_for(module)) for module in modules)
        return [
            module.rpartition(".")[2] for module, rule in rules if rule is not None and rule.style is style
        ]

    norms = norms_of(Style.RESIDUAL)
    out_norms: list[str | None] = [*norms[2:], None, None]
    gated = len(part(plan.mlp, Style.COLUMN)) == 2
    attention = Half(
        title="attention",
        norm=norms[0],
        columns=part(plan.attention, Style.COLUMN),
        between=f"attention on {counts} heads a rank",
        rows=part(plan.attention, Style.ROW),
        head_norms=tuple(norms_of(Style.SUMMED)),
        out_norm=out_norms[0],
    )
    mlp = Half(
        title="MLP",
        norm=norms[1],
        columns=part(plan.mlp, Style.COLUMN),
        between="SwiGLU: silu(gate) * up" if gated else "GELU",
        rows=part(plan.mlp, Style.ROW),
        out_norm=out_norms[1],
    )
    return attention, mlp


def _either(numbers: Iterable[int]) -> str:
    """``3``, or ``3 or 4`` where ranks differ."""
    return " or ".join(map(str, sorted(set(numbers))))


def lay_out(
    model: nn.Module,
    title: str,
    description: str,
    *,
    tp_size: int,
    dp_size: int,
    sequence_parallel: bool,
    batch: tuple[int, int],
) -> Layout:
    """Work out the layout of a model (meta tensors). Raises ConfigError where the degree does not fit."""
    plan = plan_for(model)
    if sequence_parallel and not plan.sequence_parallel:
        raise ConfigError(f"--sp does not work with {type(model).__name__}; leave it out")
    slice_map = build_slice_map(model, plan, tp_size)
    weights = _weights(model, plan, slice_map)
    heads = HeadCounts.from_config(getattr(model, "config", None))
    grouped = [heads.grouped(tp_size, rank) for rank in range(tp_size)]
    counts = f"{_either(map(sum, grouped))} query, {_either(map(len, grouped))} key/value"
    embedding = next(weight for weight in weights if weight.name == f"{plan.embedding}.weight")
    config: Any = model.config
    ranks = f"{tp_size} tensor-parallel ranks" if tp_size > 1 else "one rank"
    replicas = f" x {dp_size} replicas" if dp_size > 1 else ""
    sequence = ", sequence parallel" if sequence_parallel else ""
    return Layout(
        title=f"{title} over {ranks}{replicas}{sequence}",
        subtitle=f"{description}; {slice_map.numel():,} parameters",
        tp_size=tp_size,
        dp_size=dp_size,
        sequence_parallel=sequence_parallel,
        hidden_size=embedding.shape[1],
        num_layers=config.num_hidden_layers,
        vocab_size=embedding.shape[0],
        tied=f"{plan.head}.weight" not in slice_map.names,
        plan=plan,
        slice_map=slice_map,
        halves=_halves(plan, slice_map, weights, counts),
        embedding=embedding,
        final_norm=plan.final_norm,
        batch=batch,
        splits=all_splits(model, max(tp_size, 1), batch, 2),
    )
