"""Agreement between all ranks, over gloo: gather, broadcast, run on rank 0, barrier, equal flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from argonne.errors import ConfigError, RunError
from argonne.ranks.world import World

Result = TypeVar("Result")


def gather_objects(value: Any, world: World) -> list[Any]:
    """``value`` of every rank, by rank, on every rank."""
    if world.control_group is None:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value, group=world.control_group)
    return values


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's ``value`` on every rank."""
    if world.control_group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.control_group)
    return box[0]


def on_rank_0(function: Callable[[], Result], world: World) -> Result:
    """Run ``function`` on rank 0 and return its (picklable) result on every rank.

    A RunError that it raises is raised on every rank, so that all end and none waits.
    """
    result, problem = broadcast_object(_attempt(function, world), world)
    if problem is not None:
        raise problem
    return result


def only_on_rank_0(function: Callable[[], Result], world: World) -> Result | None:
    """Run ``function`` on rank 0 and return its result there, which never travels; None elsewhere.

    A RunError that it raises is raised on every rank.
    """
    result, problem = _attempt(function, world)
    problem = broadcast_object(problem, world)
    if problem is not None:
        raise problem
    return result


def on_all(function: Callable[[], Result], world: World) -> Result:
    """Run ``function`` on every rank; the first rank's RunError is raised on all of them."""
    result, problem = None, None
    try:
        result = function()
    except RunError as error:
        problem = error
    for other in gather_objects(problem, world):
        if other is not None:
            raise other
    return result  # type: ignore[return-value]


def _attempt(function: Callable[[], Result], world: World) -> tuple[Result | None, RunError | None]:
    """(result, None) or (None, error) on rank 0, (None, None) elsewhere."""
    if world.rank != 0:
        return None, None
    try:
        return function(), None
    except RunError as error:
        return None, error


def barrier(world: World) -> None:
    """Wait for all ranks, over gloo."""
    if world.control_group is not None:
        dist.barrier(group=world.control_group)


def check_same(values: Mapping[str, Any], world: World) -> None:
    """Raise ConfigError on all ranks where a value (a flag, a version) differs between them."""
    gathered = gather_objects(dict(values), world)
    for key, value in gathered[0].items():
        for rank, other in enumerate(gathered):
            if other.get(key) != value:
                raise ConfigError(
                    f"{key} differs between ranks: {value!r} on rank 0, {other.get(key)!r} on rank {rank}; "
                    "start all ranks with the same command"
                )
