"""Before a run allocates: does it fit its devices, or the host where it runs on a CPU?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from argonne.config.options import ParallelOptions, RunConfig
from argonne.errors import DeviceError
from argonne.ranks.agree import on_rank_0
from argonne.ranks.world import Parallel
from argonne.training.plan import Subject, chosen_layout, misfit, settled, subject

_RUNTIME_BYTES = 400_000_000
"""Of a process on a CPU beside its tensors: Python, torch, transformers."""


def require_memory(config: RunConfig, settings: Mapping[str, Any], parallel: Parallel) -> None:
    """DeviceError on all ranks where the run's plan is larger than rank 0's device, or its share of the host.

    ``--ignore-plan`` leaves the check out, and so does a system that does not say what is free.
    """
    if config.planning.ignore_plan:
        return

    def check() -> None:
        what = _subject_here(config, settings, parallel)
        if what is not None and (problem := misfit(what, chosen_layout(what))):
            raise DeviceError(problem)

    on_rank_0(check, parallel)


def settled_options(config: RunConfig, settings: Mapping[str, Any], parallel: Parallel) -> ParallelOptions:
    """The run's, with --reshard-after-forward auto decided: off on GPUs where the plan finds room.

    Collective; the same on all ranks.
    """
    options = config.parallel
    if options.reshard_after_forward != "auto":
        return options

    def stay() -> bool:
        what = _subject_here(config, settings, parallel)
        return what is not None and settled(what, chosen_layout(what)).layout.keeps_gathered

    on_gpus = parallel.device.type == "cuda" and parallel.dp_size > 1
    kept = on_gpus and on_rank_0(stay, parallel)
    return replace(options, reshard_after_forward="off" if kept else "on")


def _subject_here(config: RunConfig, settings: Mapping[str, Any], parallel: Parallel) -> Subject | None:
    """What the plan is asked about on the devices that are there; None where nobody says what is free."""
    memory = memory_of_a_rank(parallel)
    if memory is None:
        return None
    return subject(
        config, settings, world_size=parallel.world_size, device_memory=memory,
        on_cpu=parallel.device.type == "cpu", node_size=parallel.local_world_size,
    )  # fmt: skip


def memory_of_a_rank(parallel: Parallel) -> int | None:
    """Bytes that a rank may take: its GPU's, or an even share of what this host has free."""
    if parallel.device.type == "cuda":
        return int(torch.cuda.get_device_properties(parallel.device).total_memory)
    free = available_bytes()
    if free is None:
        return None
    return max(0, free // parallel.local_world_size - _RUNTIME_BYTES)


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory of this host that is free or can be freed; None where the system does not say."""
    if not meminfo.exists():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
