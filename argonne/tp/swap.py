"""Swap: a plain model's layers make way for parallel ones that hold this rank's slices."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn

from argonne.tp.group import TPGroup
from argonne.tp.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from argonne.tp.plan import HeadCounts, Style, TensorParallelPlan, stores_transposed
from argonne.tp.regions import SequenceState
from argonne.tp.slices import SliceMap
from argonne.tp.state import take_slice


def matching(model: nn.Module, pattern: str) -> list[nn.Module]:
    """The modules of ``model`` whose names match a pattern of its plan."""
    return [module for name, module in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]


def swap_layers(
    model: nn.Module,
    plan: TensorParallelPlan,
    slice_map: SliceMap,
    group: TPGroup,
    sequence: SequenceState,
    head_sequence: SequenceState,
) -> None:
    """Replace, in place, each linear layer and embedding that the plan divides.

    A tied head stays tied. The head has a sequence state of its own, since not every call hands it a slice
    of the sequence.
    """
    tied = _weight(model.get_submodule(plan.head)) is _weight(model.get_submodule(plan.embedding))
    planned = [
        (name, module, rule) for name, module in model.named_modules() if (rule := plan.rule_for(name))
    ]
    for name, module, rule in planned:
        if rule.style not in (Style.COLUMN, Style.ROW, Style.VOCABULARY):
            continue
        # A tied head's weight is in the slice map once, as the embedding's.
        known = f"{name}.weight" if f"{name}.weight" in slice_map.names else f"{plan.embedding}.weight"
        local_shape = slice_map.tp_local_shape(known, group.rank)
        layer: nn.Module
        if isinstance(module, nn.Embedding):
            entrance = sequence if plan.embedding_splits_sequence else None
            layer = _parallel_embedding(module, local_shape[0], group, entrance)
        elif rule.style is Style.ROW:
            layer = _row_layer(module, local_shape, group, sequence)
        else:
            is_head = name == plan.head
            layer = _column_layer(
                module, local_shape, group, head_sequence if is_head else sequence, enter_region=is_head
            )
        _fill(layer, module, {"weight": known, "bias": f"{name}.bias"}, slice_map, group.rank)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.train(module.training))
    if tied:
        model.get_submodule(plan.head).weight = model.get_submodule(plan.embedding).weight


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _parallel_embedding(
    module: nn.Embedding, local_rows: int, group: TPGroup, sequence: SequenceState | None
) -> VocabParallelEmbedding:
    weight = module.weight
    return VocabParallelEmbedding(
        *weight.shape,
        group=group,
        padding_idx=module.padding_idx,
        sequence=sequence,
        local_num_embeddings=local_rows,
        device="meta",
        dtype=weight.dtype,
    )


def _row_layer(
    module: nn.Module, local_shape: tuple[int, ...], group: TPGroup, sequence: SequenceState
) -> RowParallelLinear:
    in_features, out_features, options = _linear_options(module)
    local_in = local_shape[0] if options["transposed"] else local_shape[1]
    return RowParallelLinear(
        in_features, out_features, group=group, sequence=sequence, local_in_features=local_in, **options
    )


def _column_layer(
    module: nn.Module,
    local_shape: tuple[int, ...],
    group: TPGroup,
    sequence: SequenceState,
    *,
    enter_region: bool,
) -> ColumnParallelLinear:
    in_features, out_features, options = _linear_options(module)
    local_out = local_shape[1] if options["transposed"] else local_shape[0]
    return ColumnParallelLinear(
        in_features,
        out_features,
        group=group,
        sequence=sequence,
        enter_region=enter_region,
        local_out_features=local_out,
        **options,
    )


def _linear_options(module: nn.Module) -> tuple[int, int, dict[str, Any]]:
    """(in_features, out_features) of the unsharded layer, and what its parallel layer shares with it."""
    weight, transposed = _weight(module), stores_transposed(module)
    in_features, out_features = weight.shape if transposed else reversed(weight.shape)
    bias = getattr(module, "bias", None) is not None
    return (
        in_features,
        out_features,
        {"bias": bias, "transposed": transposed, "device": "meta", "dtype": weight.dtype},
    )


def _fill(
    layer: nn.Module, module: nn.Module, names: Mapping[str, str], slice_map: SliceMap, rank: int
) -> None:
    """Give ``layer`` its slices of the parameters of ``module``; those on the meta device stay there.

    ``names`` gives the slice map's name of each.
    """
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            getattr(layer, leaf).requires_grad_(parameter.requires_grad)
        else:
            part = take_slice(parameter.detach(), slice_map, names[leaf], rank)
            setattr(layer, leaf, nn.Parameter(part, requires_grad=parameter.requires_grad))


def rewrite_head_counts(
    model: nn.Module, plan: TensorParallelPlan, group: TPGroup, heads: HeadCounts
) -> None:
    """Set the head counts that the model's attention modules keep to those of this rank.

    Raises AttributeError where an attention module lacks an attribute that the plan names.
    """
    local = heads.local(group.size, group.rank)
    for attention in matching(model, plan.attention):
        for attribute, quantity in plan.head_attributes:
            if not hasattr(attention, attribute):
                raise AttributeError(
                    f"{type(attention).__name__} has no {attribute}, which the plan rewrites"
                )
            setattr(attention, attribute, local[quantity])
