"""The header's line about a layout that the plan predicts to be faster, at the same global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from argonne.config.options import RunConfig
from argonne.ranks.world import Parallel
from argonne.training.fit import memory_of_a_rank
from argonne.training.layouts import best_layouts, flags_of, settled
from argonne.training.plan import Subject, chosen_layout, subject

_WORTH_SAYING = 1.05
"""Times faster; below it lies the error of the estimate."""


def faster_layout(what: Subject) -> str | None:
    """Flags of the fastest layout that fits, and the factor; None where the chosen one is as fast.

    An estimate at assumed rates (``argonne.training.plan``): nothing is measured. Recomputation and sequence
    parallelism may differ, the sequences of a step do not.
    """
    chosen = settled(what, chosen_layout(what))
    best = next(iter(best_layouts(what, chosen.layout)), None)
    if best is None or best.layout == chosen.layout:
        return None
    factor = chosen.seconds / best.seconds
    if factor < _WORTH_SAYING:
        return None
    return (
        f"{flags_of(best.layout)}: {factor:.2f} times as fast by the plan's prediction (--plan), same tokens"
    )


def faster_line(
    config: RunConfig, settings: Mapping[str, Any], parallel: Parallel, device: str = ""
) -> dict[str, str]:
    """Label -> text, for rank 0's header; on GPUs only, whose rates the estimate assumes.

    ``settings``: the model's, as its configuration tells them; ``device``: the name of this one.
    """
    if parallel.device.type != "cuda" or parallel.rank or parallel.world_size == 1:
        return {}
    memory = memory_of_a_rank(parallel)
    if memory is None:
        return {}
    shape = {name: value for name, value in settings.items() if name != "model_type"}
    what = subject(
        config, shape, world_size=parallel.world_size, device_memory=memory,
        node_size=parallel.local_world_size, device=device,
    )  # fmt: skip
    text = faster_layout(what)
    return {"Faster layout": text} if text else {}
