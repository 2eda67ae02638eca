"""An Argonne model's parameters without the model: names and shapes, for plans made before it is built.

``model.py`` needs transformers, whose import alone takes seconds. A test holds this against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from argonne.tp.plan import TensorParallelPlan, build_slice_map
from argonne.tp.slices import SliceMap


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


def shape_only(settings: Mapping[str, Any]) -> nn.Module:
    """Meta parameters by the names and in the order of ``ArgonneModel``.

    Args:
        settings: keyword arguments of ``ArgonneConfig``, ``vocab_size`` among them.
    """
    config = SimpleNamespace(model_type="argonne2", **settings)
    heads = config.num_attention_heads
    config.head_dim = settings.get("head_dim") or config.hidden_size // heads
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    with torch.device("meta"):
        # Not drawn: on meta tensors that alone imports modules for a second.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        embedding = nn.Embedding.from_pretrained(weight, freeze=False)
        model.embed_tokens = embedding
        model.blocks = nn.ModuleList(_block(config) for _ in range(config.num_hidden_layers))
        model.norm = _Norm(config.hidden_size)
        model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = embedding.weight
    return model


@lru_cache(maxsize=64)
def planned_slice_map(model: nn.Module, plan: TensorParallelPlan, tp_size: int, pad_to: int = 1) -> SliceMap:
    """``build_slice_map`` of a model that nothing splits (meta tensors), made once for each degree."""
    return build_slice_map(model, plan, tp_size, pad_to)


@lru_cache(maxsize=256)
def most_elements(slice_map: SliceMap, names: tuple[str, ...]) -> int:
    """Elements of the named parameters on the tensor-parallel rank that holds the most, padding included."""
    return max(
        sum(math.prod(slice_map.tp_local_shape(name, rank)) for name in names)
        for rank in range(slice_map.tp_size)
    )


def _block(config: Any) -> nn.Module:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    block, attention, mlp = nn.Module(), nn.Module(), nn.Module()
    for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        setattr(attention, name, nn.Linear(hidden, width, bias=config.attention_bias))
    attention.o_proj = nn.Linear(queries, hidden, bias=config.attention_bias)
    if config.qk_norm:
        attention.q_norm, attention.k_norm = _Norm(config.head_dim), _Norm(config.head_dim)
    if config.v_norm:
        attention.v_norm_layer = _Norm(config.head_dim)
    block.attn = attention
    block.input_norm, block.post_norm = _Norm(hidden), _Norm(hidden)
    if config.sandwich_norm:
        block.attn_out_norm, block.mlp_out_norm = _Norm(hidden), _Norm(hidden)
    mlp.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
    mlp.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
    mlp.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)
    block.mlp = mlp
    return block
