"""AdamW over local slices, clipping by the true norm, and the non-finite rule.

torch.nn.utils.clip_grad_norm_ is wrong on hand-sliced parameters: it sees one rank's slices. Here the sum
of squares runs over the elements a rank owns in the slice map, and one small all-reduce a step carries
the norm, the loss, and what else the ranks have to vote on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tp_shard import SliceMap


def build_adamw(
    parameters: Mapping[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    device: torch.device,
) -> torch.optim.AdamW:
    """torch's AdamW over the local slices, one group, fused (one pass over memory); state at step 0."""
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=lr, betas=betas, weight_decay=weight_decay, fused=True
    )
    for parameter in parameters.values():
        step_device = parameter.device if device.type == "cuda" else "cpu"
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=step_device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def reset_adam(optimizer: torch.optim.Optimizer) -> None:
    """Moments and step count as at the beginning of training."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next update, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What all ranks agree on after the backward pass of an optimizer step."""

    grad_norm: float
    """Norm of the unsharded, unscaled gradient before clipping; not finite when a gradient is not."""
    loss: float
    """Mean loss over the step's tokens."""
    votes: tuple[float, ...] = ()
    """Sum over the ranks of each of the votes."""
    source_losses: tuple[float, ...] = ()
    """Of a mixture: the sum of the losses of the step's tokens of each source."""
    loss_parts: tuple[float, ...] = ()
    """Beside a teacher: the means of cross entropy and divergence that the loss is made of."""

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)


class GradientTotals:
    """Sums over the slice map: each element of the unsharded gradient counts once."""

    def __init__(self, slice_map: SliceMap, rank: int, group: dist.ProcessGroup | None) -> None:
        self._slice_map = slice_map
        self._rank = rank
        self._group = group
        self._places: dict[str, list[tuple[slice, ...]]] = {}

    def owned(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of the gradient elements this rank owns; padding among them has a gradient of zero."""
        return [gradient[place] for name, gradient in gradients.items() for place in self._places_of(name)]

    def _places_of(self, name: str) -> list[tuple[slice, ...]]:
        """Where in the local tensor; all of it at once where many boxes leave only padding out."""
        if name not in self._places:
            boxes = self._slice_map.rectangles(name, self._rank)
            owned = [box.local_index for box in boxes if box.owned]
            whole = len(owned) == len(boxes) > 1
            self._places[name] = [(slice(None),)] if whole else owned
        return self._places[name]

    def reduce(
        self,
        gradients: Mapping[str, Tensor],
        *,
        loss_share: Tensor,
        votes: Sequence[float] = (),
        scale: float = 1.0,
        source_losses: Tensor | None = None,
        loss_parts: Tensor | None = None,
    ) -> DeviceTotals:
        """One all-reduce over all ranks; nothing waits for it.

        Args:
            gradients: local gradients by parameter name, complete but not clipped, times ``scale``.
            loss_share: 0-d; the shares of all ranks add up to the step's mean loss.
            votes: what else is summed over the ranks, as many numbers on each of them.
            scale: the loss scale the gradients still carry.
            source_losses: (sources,); the shares of all ranks add up to the sums of each source.
            loss_parts: (parts,); the shares of all ranks add up to the means that the loss is made of.
        """
        parts = self.owned(gradients)
        device = loss_share.device
        squares = torch.zeros((), dtype=torch.float64, device=device)
        if parts:
            norms = torch.stack(torch._foreach_norm(parts)).to(torch.float64)
            squares = norms.square().sum()
        parts_of_all = [squares[None], loss_share.detach().double()[None], on_device(votes, device)]
        if loss_parts is not None:
            parts_of_all.append(loss_parts.double())
        if source_losses is not None:
            parts_of_all.append(source_losses.double())
        totals = torch.cat(parts_of_all)
        if self._group is not None and dist.get_world_size(self._group) > 1:
            dist.all_reduce(totals, group=self._group)
        counts = len(votes), 0 if loss_parts is None else len(loss_parts)
        return DeviceTotals(totals, counts=counts, scale=scale)


class DeviceTotals:
    """The totals of a step where they were made: what follows from them is decided there, without waiting.

    On a GPU a copy to pinned memory is under way from the beginning, so that `read` one step later finds it.

    Args:
        sums: float64: the sum of squares of the scaled gradient, the mean loss, the votes, the parts of the
            loss, and the losses of each source.
        counts: how many of them are votes, and parts of the loss.
        scale: the loss scale that the gradients carry.
    """

    def __init__(self, sums: Tensor, *, counts: tuple[int, int], scale: float) -> None:
        self._sums, self._counts, self._scale = sums, counts, scale
        self._ready: torch.cuda.Event | None = None
        self._on_host = sums
        if sums.device.type == "cuda":
            self._on_host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._on_host.copy_(sums, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def factor(self, max_norm: float) -> Tensor:
        """0-d float64: what undoes the loss scale and clips to ``max_norm`` (0: no clipping)."""
        norm = self._sums[0].sqrt() / self._scale
        factor = torch.ones_like(norm) / self._scale
        if max_norm > 0:  # not max_norm / norm: torch would multiply by the reciprocal, rounded twice
            factor *= torch.full_like(norm, max_norm).div_(norm + 1e-6).clamp_max_(1.0)
        return factor

    def not_finite(self) -> Tensor:
        """0-d float32: 1 where loss or gradient is not finite and the step must not be applied, else 0."""
        norm_and_loss = torch.stack((self._sums[0].sqrt(), self._sums[1]))
        return norm_and_loss.isfinite().all().logical_not().float()

    def read(self) -> StepTotals:
        """The numbers. Waits for the device where it has not come so far."""
        if self._ready is not None:
            self._ready.synchronize()
        square_sum, loss, *sums = self._on_host.tolist()
        votes, parts = self._counts
        voted, of_loss, by_source = sums[:votes], sums[votes : votes + parts], sums[votes + parts :]
        norm = math.sqrt(square_sum) / self._scale if square_sum >= 0 else math.nan
        return StepTotals(
            grad_norm=norm,
            loss=loss,
            votes=tuple(voted),
            source_losses=tuple(by_source),
            loss_parts=tuple(of_loss),
        )


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """float64 numbers on ``device``, which the host does not wait for: they cross from pinned memory."""
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.float64, pin_memory=pinned).to(device, non_blocking=True)


def scale_gradients(gradients: Mapping[str, Tensor], factor: Tensor) -> None:
    """Multiply by a 0-d ``factor``, in place; all have one dtype."""
    if gradients:
        tensors = list(gradients.values())
        torch._foreach_mul_(tensors, factor.to(tensors[0].dtype))


def apply_update(
    optimizer: torch.optim.AdamW, gradients: Mapping[str, Tensor], totals: DeviceTotals, *, max_norm: float
) -> None:
    """Unscale and clip the gradients, and step, unless the totals are not finite; decided on the device.

    AdamW's fused kernel leaves weights and moments alone where its ``found_inf`` is 1.
    """
    scale_gradients(gradients, totals.factor(max_norm))
    optimizer.found_inf = totals.not_finite()  # type: ignore[attr-defined]
    optimizer.step()


class LossScaler:
    """Dynamic loss scale for float16; its inputs are totals that all ranks share, so all decide alike.

    The scale halves on a non-finite gradient and doubles after ``growth_interval`` finite steps, as
    torch.amp.GradScaler's does. With ``enabled=False`` the scale stays 1.
    """

    def __init__(self, *, enabled: bool, initial_scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled = enabled
        self.scale = initial_scale if enabled else 1.0
        self._growth_interval = growth_interval
        self._finite_steps = 0

    def update(self, finite: bool) -> None:
        """Take note of a step, and move the scale for the next one."""
        if not self.enabled:
            return
        if not finite:
            self.scale = max(self.scale * 0.5, 2.0**-24)
            self._finite_steps = 0
            return
        self._finite_steps += 1
        if self._finite_steps == self._growth_interval:
            self.scale *= 2.0
            self._finite_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "finite_steps": self._finite_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint's; nothing to do without scaling, or where the run had none."""
        if self.enabled and state:
            self.scale = float(state["scale"])
            self._finite_steps = int(state["finite_steps"])


class NonFiniteRule:
    """Counts skipped steps; ``limit`` in a row are too many. Loss-scale searches do not count."""

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self.in_a_row = 0
        self.total = 0

    def record(self, *, skipped: bool) -> bool:
        """Take note of one step; True when the run must stop."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        return self.in_a_row >= self.limit
