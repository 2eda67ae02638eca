"""Attention and its projections at head_dim 170, as it is and with heads stored padded, and a 128 control."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import linear, pad

from argonne.benchmarks.common import Row, interleaved, summary, timed_row
from argonne.benchmarks.models import Shape
from model import sdpa_attention

RANKS = 8
HEAD_DIMS = (170, 176, 192, 128)
"""Argonne 2.0's, the next multiple of 8, the next tile of flash attention, and a control."""
PLAIN_HEAD_DIM = 170


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def backend_of(head_dim: int, device: torch.device, seq_len: int = 64) -> str:
    """The kernel that scaled_dot_product_attention chooses for causal training, 3 query heads on 1."""
    query = torch.randn(1, 3, seq_len, head_dim, dtype=_dtype(device), device=device, requires_grad=True)
    key = torch.randn(1, 1, seq_len, head_dim, dtype=_dtype(device), device=device, requires_grad=True)
    chosen = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True)
    return SDPBackend(chosen).name.lower()


class _Half:
    """The attention half of a block on one rank: q/k/v products, attention, output product."""

    def __init__(self, shape: Shape, head_dim: int, device: torch.device, ranks: int) -> None:
        self.heads, self.kv_heads = shape.heads // ranks, shape.key_value_heads // ranks
        self.head_dim, self.groups = head_dim, shape.heads // shape.key_value_heads
        true_dim = PLAIN_HEAD_DIM if head_dim >= PLAIN_HEAD_DIM else head_dim
        self.scaling = true_dim**-0.5
        self.device = device
        self.x = self._random(shape.batch, shape.seq_len, shape.hidden_size)
        # Rows of zeros where a head is padded: they get no gradient and stay zero.
        widths = (self.heads, self.kv_heads, self.kv_heads)
        self.weights = [self._weight(count, true_dim, shape.hidden_size) for count in widths]
        out = self._random(shape.hidden_size, self.heads, true_dim) * shape.hidden_size**-0.5
        self.out = pad(out, (0, head_dim - true_dim)).flatten(1).requires_grad_()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=_dtype(self.device), device=self.device)

    def _weight(self, heads: int, true_dim: int, hidden: int) -> torch.Tensor:
        weight = self._random(heads, true_dim, hidden) * hidden**-0.5
        return pad(weight, (0, 0, 0, self.head_dim - true_dim)).flatten(0, 1).requires_grad_()

    def heads_of(self) -> list[torch.Tensor]:
        batch, seq_len = self.x.shape[:2]
        return [
            linear(self.x, weight).view(batch, seq_len, -1, self.head_dim).transpose(1, 2)
            for weight in self.weights
        ]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa_attention(q, k, v, None, self.groups, self.scaling)

    def whole(self) -> None:
        """Forward and backward of everything."""
        attended = self.attend(*self.heads_of()).transpose(1, 2).flatten(2)
        linear(attended, self.out).sum().backward()


def _timed(work: Callable[[], None], device: torch.device) -> Callable[[], float]:
    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return run


def _attention_alone(half: _Half) -> Callable[[], None]:
    q, k, v = (head.detach().contiguous().requires_grad_() for head in half.heads_of())

    def work() -> None:
        half.attend(q, k, v).sum().backward()

    return work


def attention_rows(shape: Shape, device: torch.device, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Forward and backward at each head_dim, against 170 as it is."""
    halves = {dim: _Half(shape, dim, device, RANKS) for dim in HEAD_DIMS}
    alone = interleaved({f"{d}": _timed(_attention_alone(h), device) for d, h in halves.items()}, rounds)
    whole = interleaved({f"{d}": _timed(h.whole, device) for d, h in halves.items()}, rounds)
    plain = str(PLAIN_HEAD_DIM)
    rows = [
        timed_row(f"{what}, head_dim {dim} / {plain}", seconds[str(dim)], seconds[plain])
        for what, seconds in (("attention", alone), ("q, k, v, attention, o", whole))
        for dim in HEAD_DIMS
        if dim != PLAIN_HEAD_DIM
    ]
    data = {
        str(dim): {
            "backend": backend_of(dim, device, shape.seq_len),
            "attention": summary(alone[str(dim)]),
            "with products": summary(whole[str(dim)]),
        }
        for dim in HEAD_DIMS
    }
    return rows, data
