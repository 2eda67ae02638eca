"""One parallel layer on simulated ranks: the same inputs and initial values on each, and slices joined."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from argonne.tp.group import SimulatedTPGroup, TPGroup
from argonne.verification.simulate import simulate

SIZES = [1, 2, 3, 4]
Calls = dict[str, int]


def inputs(*shape: int, seed: int = 5) -> Tensor:
    """The same normal draws in float64 wherever it is called."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build: Callable[[], nn.Module]) -> Any:
    """What ``build`` makes from one fixed random state; torch's own state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return build()


def on_ranks(
    size: int, build: Callable[[TPGroup], nn.Module], work: Callable[[Any, TPGroup], Any]
) -> list[Any]:
    """Build a layer for each simulated rank from one random state, then run ``work`` on all together."""
    groups = SimulatedTPGroup.create(size)
    layers = [seeded(lambda group=group: build(group)) for group in groups]  # type: ignore[misc]
    return simulate(groups, lambda group: work(layers[group.rank], group))


def join(parts: list[Tensor], dimension: int, extent: int) -> Tensor:
    """The unsharded tensor from its slices; what is beyond ``extent`` must be padding, zero."""
    whole = torch.cat(parts, dim=dimension)
    surplus = whole.narrow(dimension, extent, whole.shape[dimension] - extent)
    assert torch.count_nonzero(surplus) == 0, "padding is zero"
    return whole.narrow(dimension, 0, extent)
