"""Before a run allocates: does it fit its devices, or the host where it runs on a CPU?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from argonne.config.options import RunConfig
from argonne.errors import DeviceError
from argonne.ranks.agree import gather_objects, on_rank_0
from argonne.ranks.world import Parallel, World
from argonne.training.layouts import misfit
from argonne.training.plan import PROCESS_BYTES, chosen_layout, subject
from argonne.training.stages import Stages


def require_memory_ahead(stages: Stages, settings: Mapping[str, Any], parallel: Parallel) -> None:
    """`require_memory` of this stage and those ahead: what would not fit weeks from now is said today."""
    for ahead in stages.planned[stages.index :]:
        require_memory(ahead.config, settings, parallel, ahead.name)


def require_memory(
    config: RunConfig, settings: Mapping[str, Any], parallel: Parallel, stage: str = ""
) -> None:
    """DeviceError on all ranks where the run's plan is larger than the smallest device, or a rank's share
    of its host.

    ``stage``: of a recipe, named in the error. ``--ignore-plan`` leaves the check out, and so does a system
    that does not say what is free.
    """
    if config.planning.ignore_plan:
        return

    memory = smallest_memory(parallel)

    def check() -> None:
        if memory is None:
            return
        on_cpu = parallel.device.type == "cpu"
        what = subject(
            config, settings, world_size=parallel.world_size, device_memory=memory, on_cpu=on_cpu,
            node_size=parallel.local_world_size,
        )  # fmt: skip
        if problem := misfit(what, chosen_layout(what)):
            raise DeviceError(f"stage {stage}: {problem}" if stage else problem)

    on_rank_0(check, parallel)


def smallest_memory(world: World) -> int | None:
    """Bytes that every rank may take, the same on all of them; None where none can tell. Collective."""
    told = [memory for memory in gather_objects(memory_of_a_rank(world), world) if memory is not None]
    return min(told, default=None)


def memory_of_a_rank(parallel: World) -> int | None:
    """Bytes that a rank may take: its GPU's, or an even share of what this host has free."""
    if parallel.device.type == "cuda":
        return int(torch.cuda.get_device_properties(parallel.device).total_memory)
    free = available_bytes()
    if free is None:
        return None
    return max(0, free // parallel.local_world_size - PROCESS_BYTES)


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory of this host that is free or can be freed; None where the system does not say."""
    if not meminfo.exists():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
