"""Calls of a sharded model: what its layers cannot see and its arguments tell.

A layer sees its own input only. How long the whole sequence is (a slice of it may be padded), and whether
the head's logits go into the loss on vocabulary slices or back to the caller, is known from the arguments of
the model's forward pass. `read_call` reads them; `set_up_layers` is the one place that tells the layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from argonne.tp.group import TPGroup
from argonne.tp.layers import ColumnParallelLinear
from argonne.tp.plan import TensorParallelPlan
from argonne.tp.regions import SequenceState, gather_sequence


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """What the layers need to know of one forward pass."""

    seq_len: int
    """Tokens in each sequence, on all ranks together."""
    by_embeddings: bool
    """Called with ``inputs_embeds``, past the embedding layer."""
    wants_loss: bool
    """The logits go into the loss on vocabulary slices; otherwise the caller gets them whole."""
    picks_positions: bool
    """``logits_to_keep``: the head is given some positions, picked from the whole sequence."""


def read_call(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ModelCall | None:
    """The call with these arguments; None without any tokens, which the model itself reports."""
    given = {**kwargs, **signature.bind_partial(*args, **kwargs).arguments}
    ids = given.get("input_ids")
    tokens = given.get("inputs_embeds") if ids is None else ids
    if tokens is None:
        return None
    # Transformers' own models heed shift_labels only beside labels; Argonne's takes either.
    targets = ("labels", "shift_labels") if "shift_labels" in signature.parameters else ("labels",)
    picks = given.get("logits_to_keep", 0)
    return ModelCall(
        seq_len=tokens.shape[1],
        by_embeddings=ids is None,
        wants_loss=any(given.get(name) is not None for name in targets),
        picks_positions=isinstance(picks, Tensor) or picks > 0,
    )


def set_up_layers(
    call: ModelCall, head: ColumnParallelLinear, sequence: SequenceState, head_sequence: SequenceState
) -> None:
    """Tell the layers of one model what this call needs of them."""
    sequence.seq_len = head_sequence.seq_len = call.seq_len
    head.gather_output = not call.wants_loss
    # The head gathers the sequence at its own entrance where it can, and its gradient is reduce-scattered.
    head_sequence.enabled = sequence.enabled and call.wants_loss and not call.picks_positions


def attach_call_hooks(
    model: nn.Module,
    plan: TensorParallelPlan,
    group: TPGroup,
    sequence: SequenceState,
    head_sequence: SequenceState,
) -> None:
    """Read each call of ``model`` before its forward pass, and gather the sequence for a head that does not.

    A call by ``inputs_embeds`` raises ValueError where the embedding is what splits the sequence.
    """
    head = model.get_submodule(plan.head)
    assert isinstance(head, ColumnParallelLinear)
    signature = inspect.signature(model.forward)

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = read_call(signature, args, kwargs)
        if call is None:
            return
        if call.by_embeddings and sequence.enabled and plan.embedding_splits_sequence:
            raise ValueError(
                "inputs_embeds cannot be used with sequence parallelism, because the embedding splits the "
                "sequence; give input_ids"
            )
        set_up_layers(call, head, sequence, head_sequence)

    def after_final_norm(_: nn.Module, __: Any, hidden_states: Tensor) -> Tensor | None:
        if head_sequence.enabled:
            return None
        # The head reduces the gradient at its own entrance, so that it is whole here.
        return gather_sequence(hidden_states, group, sequence.seq_len, partial=False)

    model.register_forward_pre_hook(before_forward, with_kwargs=True)
    if sequence.enabled:
        model.get_submodule(plan.final_norm).register_forward_hook(after_final_norm)
