"""The tensor-parallel plan: which style each module of a model gets, and the cuts that follow.

A plan is a table of (module name pattern, style, unit). The style says how the module's parameters lie on
the ranks and where collectives stand; the unit says what must not be cut apart (heads). The plan alone
drives splitting, gathering, initial values, clipping and checkpoints, through the slice map.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from argonne.errors import ConfigError
from argonne.tp.head_cuts import head_cut, head_range
from argonne.tp.slices import Cut, Shape, SliceMap, even_cut, fused_cut, rounded_up


class Style(Enum):
    """How the parameters of a module lie on the ranks of the tensor-parallel group."""

    COLUMN = "column"
    """Output features divided, biases with them."""
    ROW = "row"
    """Input features divided; the bias whole, added once after the reduction."""
    VOCABULARY = "vocabulary"
    """Vocabulary rows divided (embedding, head)."""
    REPLICATED = "replicated"
    """Whole on every rank, with equal gradients."""
    RESIDUAL = "residual"
    """Whole on every rank and applied to the residual stream: under sequence parallelism each rank sees
    its own positions only, and the gradient is summed over the group."""
    SUMMED = "summed"
    """Whole on every rank but applied to local heads: the gradient is always summed over the group."""


class Unit(Enum):
    """What the divided dimension is made of."""

    QUERY_HEADS = "query heads"
    KEY_VALUE_HEADS = "key/value heads"
    FUSED_HEADS = "query, key and value heads in one parameter"
    FEATURES = "features"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the plan; ``pattern`` is matched against module names, first match wins."""

    pattern: str
    style: Style
    unit: Unit = Unit.FEATURES


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A method of a block that makes several column products of one input: they share one entrance."""

    pattern: str
    method: str
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TensorParallelPlan:
    """The table for one architecture, and the names of the places where regions begin and end."""

    rules: tuple[Rule, ...]
    attention: str
    """Pattern of the attention modules, whose head counts are rewritten."""
    mlp: str
    first_block: str
    final_norm: str
    embedding: str
    head: str
    seams: tuple[Seam, ...] = ()
    """Empty: the entrance is a hook on the attention and MLP modules instead."""
    gated_exit: Seam | None = None
    """The method that takes gate and up to the MLP's output, silu(gate) * up through its one member."""
    head_attributes: tuple[tuple[str, str], ...] = ()
    """(attribute of the attention module, quantity) pairs; quantities are the keys of `HeadCounts.local`."""
    embedding_splits_sequence: bool = False
    """Under sequence parallelism the embedding's sum is scattered over the sequence. Otherwise the sequence
    is split at the first block's entrance, for models that derive positions from the embedding's length."""
    sequence_parallel: bool = True
    """Whether the model's own code allows the residual stream to be a slice of the sequence."""
    padded_heads: bool = False
    """Whether heads can be stored padded (``argonne.tp.padded_heads``): attention keeps ``head_dim`` apart
    from its scaling, and the model keeps ``rotary_frequencies``."""

    def rule_for(self, module_name: str) -> Rule | None:
        """The first rule that matches, or None: the module's parameters are replicated."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(module_name, rule.pattern)), None)


@dataclass(frozen=True, kw_only=True)
class HeadCounts:
    """Attention heads of the unsharded model."""

    query_heads: int
    key_value_heads: int
    head_dim: int
    pad_to: int = 1
    """A head is stored as the next multiple of this."""

    @classmethod
    def from_config(cls, config: Any, pad_to: int = 1) -> HeadCounts:
        """By the names that Hugging Face configurations share; AttributeError where one has no heads.

        Without a number of key/value heads there are as many as query heads.
        """
        query_heads = config.num_attention_heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or query_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        return cls(query_heads=query_heads, key_value_heads=key_value_heads, head_dim=head_dim, pad_to=pad_to)

    @property
    def stored_dim(self) -> int:
        """Features of a head in local tensors, padding included."""
        return rounded_up(self.head_dim, self.pad_to)

    def grouped(self, tp_size: int, tp_rank: int) -> tuple[int, ...]:
        """How many of one rank's query heads belong to each of its key/value heads, in order."""
        group = self.query_heads // self.key_value_heads
        own = head_range(self.query_heads, tp_size, tp_rank)
        shared = range(own[0] // group, own[-1] // group + 1)
        return tuple(len(range(max(own[0], h * group), min(own[-1] + 1, (h + 1) * group))) for h in shared)

    def width(self, unit: Unit, tp_size: int, tp_rank: int) -> int:
        """Features of heads that a projection hands to attention on one rank, repeated ones included."""
        local = self.local(tp_size, tp_rank)
        query, key_value = local["query_width"], local["key_value_heads"] * self.stored_dim
        return {Unit.QUERY_HEADS: query, Unit.KEY_VALUE_HEADS: key_value}.get(unit, query + 2 * key_value)

    def local(self, tp_size: int, tp_rank: int) -> dict[str, int]:
        """The quantities that attention modules keep, on one rank.

        Key/value heads as attention sees them: where query heads are not in groups of one size, the heads
        that ``argonne.tp.uneven_heads`` makes of those that the rank holds.
        """
        counts = self.grouped(tp_size, tp_rank)
        groups = math.gcd(*counts)
        return {
            "query_heads": sum(counts),
            "key_value_heads": sum(counts) // groups,
            "groups": groups,
            "query_width": sum(counts) * self.stored_dim,
            "head_dim": self.stored_dim,
        }


def degree_fits(query_heads: int, tp_size: int) -> bool:
    """Whether each rank gets a query head, and with it the key/value head that it needs."""
    return 1 <= tp_size <= query_heads


def fitting_degrees(query_heads: int) -> list[int]:
    """All tensor-parallel degrees the heads allow, ascending."""
    return list(range(1, query_heads + 1))


def check_degree(query_heads: int, tp_size: int, *, processes: int = 0) -> None:
    """Raise ConfigError where ``tp_size`` does not fit the heads.

    It names the degrees that work; where the number of ``processes`` is given, those that divide it too.
    """
    if degree_fits(query_heads, tp_size):
        return
    degrees = [degree for degree in fitting_degrees(query_heads) if processes % degree == 0]
    raise ConfigError(
        f"--tensor-parallel-size {tp_size} leaves ranks without any of the {query_heads} attention heads; "
        f"use {degree_list(degrees)}"
    )


def degree_list(degrees: Sequence[int]) -> str:
    """Degrees as a message names them: ``1, 2 or 4``, or ``1 to 24``."""
    if len(degrees) > 2 and degrees[-1] - degrees[0] == len(degrees) - 1:
        return f"{degrees[0]} to {degrees[-1]}"
    *others, last = [str(degree) for degree in degrees]
    return f"{', '.join(others)} or {last}" if others else last


def _weight_cut(rule: Rule, shape: Shape, heads: HeadCounts, tp_size: int, dimension: int) -> Cut:
    if rule.unit is Unit.FEATURES:
        return even_cut(shape[dimension], tp_size, dimension, heads.pad_to)
    stored_dim = heads.stored_dim
    query = head_cut(heads.query_heads, heads.head_dim, tp_size, dimension, stored_dim=stored_dim)
    if rule.unit is Unit.QUERY_HEADS:
        return query
    key_value = head_cut(
        heads.key_value_heads,
        heads.head_dim,
        tp_size,
        dimension,
        query_heads=heads.query_heads,
        stored_dim=stored_dim,
    )
    if rule.unit is Unit.KEY_VALUE_HEADS:
        return key_value
    widths = [heads.query_heads * heads.head_dim] + 2 * [heads.key_value_heads * heads.head_dim]
    return fused_cut([query, key_value, key_value], widths)


def parameter_cut(
    rule: Rule | None, leaf: str, shape: Shape, heads: HeadCounts, tp_size: int, *, transposed: bool
) -> Cut | None:
    """How a module's parameter (``leaf``: "weight" or "bias") is cut; None: every rank holds it whole.

    ``transposed`` marks weights stored as (in_features, out_features), as GPT-2's are. Local extents are
    padded to a multiple of ``heads.pad_to``.
    """
    if rule is None or tp_size == heads.pad_to == 1:
        return None
    cut = None
    if rule.style is Style.VOCABULARY:
        cut = even_cut(shape[0], tp_size, 0, heads.pad_to)
    elif rule.style is Style.COLUMN:
        dimension = 1 if transposed and leaf == "weight" else 0
        cut = _weight_cut(rule, shape, heads, tp_size, dimension)
    elif rule.style is Style.ROW and leaf == "weight":
        cut = _weight_cut(rule, shape, heads, tp_size, 0 if transposed else 1)
    return cut if cut is not None and (tp_size > 1 or cut.is_padded) else None


def stores_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (in_features, out_features): transformers' Conv1D."""
    return type(module).__name__ == "Conv1D"


def build_slice_map(model: nn.Module, plan: TensorParallelPlan, tp_size: int, pad_to: int = 1) -> SliceMap:
    """The slice map of an unsharded model (meta tensors will do), in the order of its parameters.

    Heads and the other local extents are padded to a multiple of ``pad_to``. Raises ConfigError where the
    degree does not fit the heads.
    """
    heads = HeadCounts.from_config(getattr(model, "config", None), pad_to)
    check_degree(heads.query_heads, tp_size)
    modules = dict(model.named_modules())
    cuts: dict[str, tuple[Shape, Cut | None]] = {}
    for name, parameter in model.named_parameters():
        module_name, leaf = name.rsplit(".", 1)
        cut = parameter_cut(
            plan.rule_for(module_name),
            leaf,
            tuple(parameter.shape),
            heads,
            tp_size,
            transposed=stores_transposed(modules[module_name]),
        )
        cuts[name] = (tuple(parameter.shape), cut)
    return SliceMap(cuts, tp_size=tp_size)


def summed_parameters(
    model: nn.Module, plan: TensorParallelPlan, *, sequence_parallel: bool
) -> tuple[str, ...]:
    """Names of the replicated parameters whose gradients are partial and summed over the group."""
    names = []
    for name, _ in model.named_parameters():
        module_name, leaf = name.rsplit(".", 1)
        rule = plan.rule_for(module_name)
        if rule is None:
            continue
        on_residual = rule.style is Style.RESIDUAL or (rule.style is Style.ROW and leaf == "bias")
        if rule.style is Style.SUMMED or (sequence_parallel and on_residual):
            names.append(name)
    return tuple(names)
