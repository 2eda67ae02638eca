"""Entrances and exits of a sharded model's blocks: where its parallel regions begin and end.

A row layer is its own exit. An entrance serves several column layers at once (q, k, v of one input; gate,
up), so it is put around the method that calls them, or, where the model has no such method, in front of the
attention or MLP module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from argonne.tp.fused import ColumnGroup, GatedExit
from argonne.tp.group import TPGroup
from argonne.tp.plan import TensorParallelPlan
from argonne.tp.regions import SequenceState, copy_to_region, gather_sequence, split_sequence
from argonne.tp.swap import matching


def attach_entrances(
    model: nn.Module, plan: TensorParallelPlan, group: TPGroup, sequence: SequenceState
) -> None:
    """Attach one entrance to each attention and MLP block whose layers have been swapped, and gated exits."""
    if plan.gated_exit is not None:
        for module in matching(model, plan.gated_exit.pattern):
            layer = getattr(module, plan.gated_exit.members[0])
            plain = getattr(module, plan.gated_exit.method)
            setattr(module, plan.gated_exit.method, GatedExit(layer, plain))
    if group.size == 1:
        return
    if plan.seams:
        _fuse_columns(model, plan, group, sequence)
    else:
        _enter_before_blocks(model, plan, group, sequence)
    if sequence.enabled and not plan.embedding_splits_sequence:
        _transform_input(model.get_submodule(plan.first_block), lambda hidden: split_sequence(hidden, group))


def _fuse_columns(
    model: nn.Module, plan: TensorParallelPlan, group: TPGroup, sequence: SequenceState
) -> None:
    """Around the methods that call the column layers: their products share one autograd node."""
    for seam in plan.seams:
        for module in matching(model, seam.pattern):
            members = [getattr(module, member) for member in seam.members]
            setattr(module, seam.method, ColumnGroup(members, group, sequence))


def _enter_before_blocks(
    model: nn.Module, plan: TensorParallelPlan, group: TPGroup, sequence: SequenceState
) -> None:
    """In front of the attention and MLP modules, for model code that has no method to stand in for."""

    def enter(hidden_states: Tensor) -> Tensor:
        if sequence.enabled:
            return gather_sequence(hidden_states, group, sequence.seq_len)
        return copy_to_region(hidden_states, group)

    for pattern in (plan.attention, plan.mlp):
        for module in matching(model, pattern):
            _transform_input(module, enter)


def _transform_input(module: nn.Module, transform: Callable[[Tensor], Tensor]) -> None:
    """Apply ``transform`` to the hidden states a module is called with, by position or by keyword."""

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (transform(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": transform(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)
