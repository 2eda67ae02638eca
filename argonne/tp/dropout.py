"""Dropout of a split model: one mask on replicated activations, a different one on each slice.

Each rank has a random state of its own. Where they differ, a rank that drops other elements of the residual
stream than its peers computes another model; where they are equal, all ranks' heads get the same mask. So a
forward pass draws from a random state that the group shares, and between the entrance of a block and its
row layer, where activations are divided, from one of the rank's own that derives from the shared one
(Shoeybi et al. 2019, appendix B.2). Nothing but torch's default generators is used: a recomputed block, whose
random state torch puts back, gets the masks of its forward pass again. Without dropout nothing is drawn and
nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from argonne.errors import ConfigError
from argonne.tp.group import SimulatedTPGroup, TPGroup
from argonne.tp.layers import RowParallelLinear
from argonne.tp.plan import TensorParallelPlan
from argonne.tp.swap import matching

_SEEDS = 1 << 48


@dataclass(frozen=True, kw_only=True)
class _RandomState:
    """torch's default generators of the CPU and of one other device."""

    cpu: Tensor
    device: torch.device
    other: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(cpu=torch.get_rng_state(), device=device, other=other)

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.other is not None:
            torch.get_device_module(self.device).set_rng_state(self.other, self.device)


def _draw_seed() -> Tensor:
    return torch.randint(_SEEDS, (1,), dtype=torch.int64, device="cpu")


def _seed(number: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(number)


def _tensor_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device of a call's first tensor."""
    given = (*args, *kwargs.values())
    return next((value.device for value in given if isinstance(value, Tensor)), torch.device("cpu"))


def attach_dropout(model: nn.Module, plan: TensorParallelPlan, group: TPGroup) -> None:
    """Share the random state of a split model's training passes, if its architecture has dropout.

    The ranks of a simulated group are threads with one random state between them: a training pass with
    dropout raises ConfigError there.
    """
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    on_scores: list[Any] = [m for m in matching(model, plan.attention) if hasattr(m, "attention_dropout")]
    if group.size == 1 or not (dropouts or on_scores):
        return

    def drops() -> bool:
        return any(module.training and module.p > 0 for module in dropouts) or any(
            module.training and module.attention_dropout > 0 for module in on_scores
        )

    own: list[_RandomState] = []

    def share(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own.clear()
        if not drops():
            return
        if isinstance(group, SimulatedTPGroup):
            raise ConfigError(
                "simulated ranks share one random state: set dropout to 0, call eval(), or use processes"
            )
        device = _tensor_device(args, kwargs)
        seed = group.all_reduce(_draw_seed().to(device), "max")
        own.append(_RandomState.now(device))
        _seed(int(seed.item()), device)

    def give_back(*_: Any) -> None:
        if own:
            own.pop().put_back()

    model.register_forward_pre_hook(share, with_kwargs=True)
    model.register_forward_hook(give_back, always_call=True)
    for pattern in (plan.attention, plan.mlp):
        for block in matching(model, pattern):
            _divide(block, group, drops)


def _divide(block: nn.Module, group: TPGroup, drops: Any) -> None:
    """From the block's entrance to its row layer, draw from a state of this rank's own."""
    shared: list[_RandomState] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shared.clear()  # a recomputation may have ended before the row layer
        if drops():
            device = _tensor_device(args, kwargs)
            seed = int(_draw_seed().item())
            shared.append(_RandomState.now(device))
            _seed(seed + 1 + group.rank, device)

    def leave(*_: Any) -> None:
        if shared:
            shared.pop().put_back()

    block.register_forward_pre_hook(enter, with_kwargs=True)
    for layer in block.modules():
        if isinstance(layer, RowParallelLinear):
            layer.register_forward_pre_hook(leave)
