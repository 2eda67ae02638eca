"""A block as it is written, whole and on one device: what an audit holds a split block against.

The modules are those of ``model.py``, but for attention, which is spelled out here, in runs of queries: a
fused kernel that is wrong must not judge itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import ArgonneAttention, ArgonneBlock, ArgonneModel, apply_rotary, rotary_tables

RUN = 256
"""Queries that attend at one time; each run's scores are made again in the backward pass."""


def wider_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the exact block: float32 for 16 bits, float64 for float32."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


class PlainBlocks:
    """One block twice: exact, in the wide dtype, and rough, in the run's own.

    ``weights`` are unsharded, by name within the block; those that are None are missing.
    """

    def __init__(
        self, model: ArgonneModel, index: int, weights: Mapping[str, Tensor | None], dtype: torch.dtype
    ) -> None:
        self._model, self._index = model, index
        self._exact = self._block(weights, wider_dtype(dtype))
        self._rough = self._block(weights, dtype)
        self._sums: dict[str, Tensor] = {}
        """Gradients of the rough block's weights, added up in the wide dtype as one product would."""

    def _block(self, weights: Mapping[str, Tensor | None], dtype: torch.dtype) -> ArgonneBlock:
        with torch.device("meta"):
            block = ArgonneBlock(self._model.config, self._index)
        copies = {name: whole.to(dtype, copy=True) for name, whole in weights.items() if whole is not None}
        block.load_state_dict(copies, assign=True)
        block.attn.forward = partial(plain_attention, block.attn)  # type: ignore[method-assign]
        return block.requires_grad_().train()

    def take(
        self, entered: Tensor, arrived: Tensor, documents: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One sequence forward and backward: output and gradient of the input, each exact and rough.

        All are (seq_len, hidden_size).
        """
        exact = self._pass(self._exact, entered, arrived, documents)
        rough = self._pass(self._rough, entered, arrived, documents)
        for name, parameter in self._rough.named_parameters():
            grad, parameter.grad = parameter.grad, None
            assert grad is not None
            wide = grad.to(exact[0].dtype)
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
        return (exact[0], rough[0]), (exact[1], rough[1])

    def _pass(
        self, block: ArgonneBlock, entered: Tensor, arrived: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = block.input_norm.weight.dtype
        positions = torch.arange(len(entered), device=entered.device)[None]
        rotary = rotary_tables(self._model.rotary_frequencies, positions, dtype)
        hidden = entered.to(dtype)[None].detach().requires_grad_()
        output = block(hidden, rotary, documents=documents)
        output.backward(arrived.to(dtype)[None])
        assert hidden.grad is not None
        return output.detach()[0], hidden.grad[0]

    def gradients(self, name: str) -> tuple[Tensor, Tensor]:
        """Of a weight, over all sequences taken: exact and rough."""
        exact = self._exact.get_parameter(name).grad
        assert exact is not None
        return exact, self._sums[name]


def plain_attention(
    attention: ArgonneAttention,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    _: Any = None,
    __: Any = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The forward pass of ``attention`` over (batch, seq_len, hidden_size), causal, without a fused kernel.

    ``documents``: `model.document_starts` (batch, seq_len). Memory grows with RUN times the length.
    """
    batch, seq_len, query, key, value = attention._heads(hidden_states)
    query, key = (apply_rotary(x, *position_embeddings) for x in (query, key))
    groups = attention.num_key_value_groups
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    places = torch.arange(seq_len, device=query.device)
    first = torch.zeros_like(places)[None] if documents is None else documents
    if attention.window is not None:
        first = torch.maximum(first, places - attention.window)
    outputs = []
    for begin in range(0, seq_len, RUN):
        end = min(begin + RUN, seq_len)
        seen = (places[:end] <= places[begin:end, None]) & (places[:end] >= first[:, begin:end, None])
        run = (query[:, :, begin:end], key[:, :, :end], value[:, :, :end], seen[:, None], attention.scaling)
        outputs.append(checkpoint(_attend, *run, use_reentrant=False, preserve_rng_state=False))
    heads = torch.cat(outputs, dim=2).transpose(1, 2)
    projected: Tensor = attention.o_proj(heads.reshape(batch, seq_len, -1))
    return projected


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> Tensor:
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=wide).to(query.dtype) @ value


def room_needed(model: ArgonneModel, layer: int, tokens: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes that an audit takes at most on one rank; ``tokens``: (batch, seq_len) of a micro-batch."""
    config, wide = model.config, wider_dtype(dtype).itemsize
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in ArgonneBlock(config, layer).parameters())
    heads = config.num_attention_heads * config.head_dim
    sequence = 16 * config.hidden_size + 8 * heads + 6 * config.intermediate_size
    kept = 4 * tokens[0] * tokens[1] * config.hidden_size * dtype.itemsize
    scores = 4 * config.num_attention_heads * RUN * tokens[1]
    return kept + wide * (6 * weights + tokens[1] * sequence + scores)
