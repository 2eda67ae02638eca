"""The layers of the practice lesson: written once, built unsharded and split, run and compared.

`MLP` and `Attention` know nothing of ranks. Given torch's linear layers they are the unsharded block; given
the column- and row-parallel layers, and an entrance, they are one rank's part of the same block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tp_shard import ColumnParallelLinear, RowParallelLinear, TPGroup, copy_to_region

HIDDEN, FEATURES = 64, 192
QUERY_HEADS, KEY_VALUE_HEADS, HEAD_DIM = 16, 8, 4
BATCH, SEQ_LEN = 2, 10

Entrance = Callable[[Tensor], Tensor]
Layer = Callable[..., nn.Module]


Pair = Callable[[TPGroup], tuple[nn.Module, nn.Module]]
"""Builds a block twice: unsharded, and this rank's part."""


def degrees() -> list[int]:
    """Numbers of ranks, 2 and more, that get whole query and key/value heads each."""
    return [n for n in range(2, KEY_VALUE_HEADS + 1) if QUERY_HEADS % n == 0 and KEY_VALUE_HEADS % n == 0]


# ---------------------------------------------------------------------------------------------------
# The blocks


def no_entrance(x: Tensor) -> Tensor:
    """What the unsharded block has in the entrance's place."""
    return x


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), x (batch, seq_len, hidden)."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, enter: Entrance) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.enter = enter

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        inner = F.silu(self.gate(x)) * self.up(x)
        y: Tensor = self.down(inner)
        return y


class Attention(nn.Module):
    """x + o(attention(q, k, v)) of the normed x (batch, seq_len, hidden); grouped heads, causal."""

    def __init__(self, q: nn.Module, k: nn.Module, v: nn.Module, o: nn.Module, enter: Entrance) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.q, self.k, self.v, self.o = q, k, v, o
        self.enter = enter

    def forward(self, x: Tensor) -> Tensor:
        normed = self.enter(self.norm(x))
        # (batch, seq_len, local_heads * head_dim) -> (batch, local_heads, seq_len, head_dim)
        q, k, v = (
            layer(normed).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y: Tensor = x + self.o(attended.transpose(1, 2).flatten(2))
        return y


# ---------------------------------------------------------------------------------------------------
# Built unsharded, and split


def own_part(whole: Tensor, local_shape: torch.Size, group: TPGroup) -> Tensor:
    """This rank's part of an unsharded tensor; the dimension that is shorter locally is cut evenly."""
    for dim, (extent, local) in enumerate(zip(whole.shape, local_shape, strict=True)):
        if extent != local:
            return whole.chunk(group.size, dim)[group.rank]
    return whole


def load_parts(split: nn.Module, plain: nn.Module, group: TPGroup) -> None:
    """Fill the split block with this rank's slices of the unsharded one's weights."""
    wholes = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            parameter.copy_(own_part(wholes[name], parameter.shape, group))


def linear_pair(group: TPGroup) -> tuple[nn.Module, nn.Module]:
    """One linear layer: unsharded, and column-parallel with gathered output."""
    return nn.Linear(HIDDEN, FEATURES), ColumnParallelLinear(
        HIDDEN, FEATURES, group=group, gather_output=True
    )


def mlp_pair(group: TPGroup) -> tuple[nn.Module, nn.Module]:
    """Gate and up column-parallel behind one entrance, down row-parallel."""
    plain = MLP(
        nn.Linear(HIDDEN, FEATURES), nn.Linear(HIDDEN, FEATURES), nn.Linear(FEATURES, HIDDEN), no_entrance
    )
    column = functools.partial(ColumnParallelLinear, group=group, enter_region=False)
    split = MLP(
        column(HIDDEN, FEATURES),
        column(HIDDEN, FEATURES),
        RowParallelLinear(FEATURES, HIDDEN, group=group),
        functools.partial(copy_to_region, group=group),
    )
    return plain, split


def naive_mlp_pair(group: TPGroup) -> tuple[nn.Module, nn.Module]:
    """The same MLP, each of its three layers split for itself: right, and needlessly talkative."""
    plain, _ = mlp_pair(group)
    column = functools.partial(ColumnParallelLinear, group=group, gather_output=True)
    return plain, MLP(
        column(HIDDEN, FEATURES), column(HIDDEN, FEATURES), column(FEATURES, HIDDEN), no_entrance
    )


def attention_pair(group: TPGroup, *, with_entrance: bool = True) -> tuple[nn.Module, nn.Module]:
    """Whole heads on each rank; ``with_entrance=False`` makes the mistake that no output shows."""
    query, key_value = QUERY_HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM

    def block(column: Layer, row: Layer, enter: Entrance) -> Attention:
        k, v = column(HIDDEN, key_value), column(HIDDEN, key_value)
        return Attention(column(HIDDEN, query), k, v, row(query, HIDDEN), enter)

    plain = functools.partial(nn.Linear, bias=False)
    column = functools.partial(ColumnParallelLinear, bias=False, group=group, enter_region=False)
    row = functools.partial(RowParallelLinear, bias=False, group=group)
    enter = functools.partial(copy_to_region, group=group) if with_entrance else no_entrance
    return block(plain, plain, no_entrance), block(column, row, enter)


# ---------------------------------------------------------------------------------------------------
# Run and compared


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one rank saw of one block."""

    rank: int
    weights: dict[str, tuple[int, ...]]
    """Shape of each parameter here."""
    outputs: dict[str, tuple[int, ...]]
    """Shape of what each inner layer gave here, and of the block's output under ""."""
    forward: dict[str, tuple[int, int]]
    """Collectives of the forward pass: kind -> (calls, payload bytes)."""
    backward: dict[str, tuple[int, int]]
    errors: dict[str, float]
    """||split - unsharded|| / ||unsharded|| of the output "y", "d x" and "d <parameter>", own parts."""
    maximum: float
    """Largest absolute difference of an element of any of these."""

    def shape(self, what: str) -> tuple[int, ...]:
        """Of a parameter, or of an output named "-> layer" (of the block itself: "-> ")."""
        return self.outputs[what[3:]] if what.startswith("-> ") else self.weights[what]


def run(build: Pair, group: TPGroup, device: torch.device, seed: int) -> Trial:
    """Build a block unsharded and split, run both forward and backward on one batch, compare."""
    generator = torch.Generator().manual_seed(seed)  # every rank draws the same weights and the same batch
    plain, split = build(group)
    _draw(plain, generator)
    x = torch.randn(BATCH, SEQ_LEN, HIDDEN, generator=generator).to(device)
    plain, split = plain.to(device), split.to(device)
    load_parts(split, plain, group)
    expected, expected_grads = _forward_backward(plain, x, None)

    outputs: dict[str, tuple[int, ...]] = {}
    for name, layer in split.named_modules():
        layer.register_forward_hook(functools.partial(_note_shape, outputs, name))
    counts: list[dict[str, tuple[int, int]]] = []
    group.counters.reset()
    y, grads = _forward_backward(split, x, lambda: counts.append(_take_counts(group)))
    forward, backward = counts
    pairs = {"y": (y, expected)}
    for name, grad in grads.items():
        pairs[f"d {name}"] = (grad, own_part(expected_grads[name], grad.shape, group))
    return Trial(
        rank=group.rank,
        weights={name: tuple(parameter.shape) for name, parameter in split.named_parameters()},
        outputs=outputs,
        forward=forward,
        backward=backward,
        errors={name: float((here - there).norm() / there.norm()) for name, (here, there) in pairs.items()},
        maximum=max(float((here - there).abs().max()) for here, there in pairs.values()),
    )


def _draw(plain: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if not name.startswith("norm"):
                parameter.normal_(0.0, HIDDEN**-0.5, generator=generator)


def _note_shape(outputs: dict[str, tuple[int, ...]], name: str, _: Any, __: Any, output: Tensor) -> None:
    outputs[name] = tuple(output.shape)


def _take_counts(group: TPGroup) -> dict[str, tuple[int, int]]:
    counts = group.counters.totals()
    group.counters.reset()
    return counts


def _forward_backward(
    block: nn.Module, x: Tensor, after_each: Callable[[], None] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a loss whose gradient with respect to y differs from element to element."""
    x = x.clone().requires_grad_()
    y = block(x)
    if after_each is not None:
        after_each()
    (y.sin().sum()).backward()
    if after_each is not None:
        after_each()
    grads = {
        name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None
    }
    assert x.grad is not None
    return y.detach(), {"x": x.grad, **grads}
