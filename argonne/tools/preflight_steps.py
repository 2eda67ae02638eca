"""Two steps of the run itself before it starts: its build, data, forward, backward and optimizer."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from argonne.errors import NonFiniteError
from argonne.ranks.agree import barrier, gather_objects
from argonne.training.setup import build, fill, open_feed
from argonne.training.state import peak_memory_bytes
from argonne.training.step import TrainingStep, Votes

if TYPE_CHECKING:
    from argonne.tools.preflight import Preflight

STEPS = 2


def two_steps(flight: Preflight) -> str:
    """Train two steps from where the run begins, and forget them; collective.

    Without streaming the run's own cache would tokenize the whole corpus first: its data is then read as a
    stream, from the beginning.
    """
    stages, start, parallel = flight.stages, flight.start, flight.parallel
    assert stages is not None and start is not None and parallel is not None
    stage, config = stages.current, stages.current.config
    metadata, step, new_stage = start.metadata, start.step, start.step == stages.first_step
    streamed = "" if config.data.streaming else "; data as a stream, not from the token cache"
    if streamed:
        config, metadata, step = replace(config, data=replace(config.data, streaming=True)), {}, 0
    _, feed = open_feed(
        config,
        start.tokenizer,
        metadata,
        step,
        stage.samples_per_step,
        flight.report,
        parallel,
        start.settings["vocab_size"],
        new_stage=new_stage,
    )
    try:
        trained = build(config, start.settings, parallel)
        fill(config, trained, start, flight.report)
        one_step = TrainingStep(trained, config.training, stage.accumulation)
        losses, seconds = [], 0.0
        for number in range(STEPS):
            batch = feed.next()
            began = time.monotonic()
            result = one_step.run(batch, start.step - stages.first_step + number, votes=Votes())
            seconds = time.monotonic() - began
            losses.append(result.totals.loss)
    finally:
        feed.close()
    barrier(parallel)  # no feed of this group is left on any rank
    if not all(math.isfinite(loss) for loss in losses) and trained.dtype is not torch.float16:
        raise NonFiniteError(
            f"the losses were {', '.join(map(str, losses))}: lower --learning-rate, or check the data with "
            "scripts/inspect_data.py"
        )
    peak = max(gather_objects(peak_memory_bytes(parallel.device), parallel))
    shown = " then ".join(f"{loss:.3f}" for loss in losses)
    return f"loss {shown}; the second took {seconds:.2f} s; peak {peak / 1e9:.2f} GB a rank{streamed}"
