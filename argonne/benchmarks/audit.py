"""What the audit of a layer costs: over two ranks, beside the steps between two audits."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import torch.distributed as dist
from torch import Tensor

from argonne.benchmarks.common import Report, Row, interleaved, summary, timed_row
from argonne.benchmarks.models import SHAPES, our_model, split_over, training_options
from argonne.config.run_options import ControlOptions
from argonne.data.feed import StepBatch
from argonne.testing.distributed import run_ranks
from argonne.training.audit import Turn, judge
from argonne.training.step import TrainingStep, Votes
from argonne.verification.block_tap import BlockTap, checksums

RANKS = 2
INTERVAL = ControlOptions().audit_interval
MOST = 0.01
"""Share of the time that audits may take."""


def audit_rank(rank: int, world_size: int, name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a plain step, of one that is watched, and of the verdict after it, by round."""
    shape = SHAPES[name]
    parallel = dataclasses.replace(split_over(world_size), control_group=dist.group.WORLD)
    trained = our_model(shape, parallel)
    step = TrainingStep(trained, training_options(shape), 1)
    batch = StepBatch(tokens=shape.tokens(), stream_hash="", progress=None, wait_seconds=0.0)
    verdicts: list[float] = []
    numbers = itertools.count()

    def timed(layer: int | None = None) -> tuple[float, BlockTap | None, Tensor | None]:
        dist.barrier()
        start = time.perf_counter()
        tap, rest = None, None
        if layer is not None:
            rest = checksums(dict(trained.model.blocks[layer].named_parameters()))
            tap = BlockTap(trained.model, layer)
        step.run(batch, 0, votes=Votes())
        return time.perf_counter() - start, tap, rest

    def audited() -> float:
        turn = Turn.of(next(numbers), shape.layers, world_size)
        seconds, tap, rest = timed(turn.layer)
        assert tap is not None
        start = time.perf_counter()
        tap.remove()
        verdict = judge(trained, tap, turn.oracle, rest)
        assert verdict is not None and not verdict.fault, verdict
        verdicts.append(time.perf_counter() - start)
        return seconds

    seconds = interleaved({"step": lambda: timed()[0], "audited step": audited}, rounds)
    return {**seconds, "verdict": verdicts[-rounds:]}


def row_of(name: str, ranks: list[dict[str, list[float]]]) -> tuple[Row, dict[str, Any]]:
    """How many steps an audit is worth, both as long as on their slowest rank."""
    slowest = {key: [max(both) for both in zip(*(r[key] for r in ranks), strict=True)] for key in ranks[0]}
    added = [
        verdict + max(0.0, audited - plain) for plain, audited, verdict in zip(*slowest.values(), strict=True)
    ]
    label = f"{name}: an audit / a step ({MOST * INTERVAL:.0f} are {MOST:.0%} at --audit-interval {INTERVAL})"
    row = timed_row(label, added, slowest["step"], target=MOST * INTERVAL)
    return row, {key: summary(values) for key, values in slowest.items()}


def run(rounds: int) -> Report:
    rows, data = [], {}
    for name in SHAPES:
        row, data[name] = row_of(name, run_ranks(audit_rank, RANKS, name, rounds, timeout=600))
        rows.append(row)
    return Report(
        name="audit",
        title=f"An audit of a layer, tp {RANKS}, 512 tokens, float32, gloo: minima of {rounds} rounds",
        rows=tuple(rows),
        remarks=("an audit: what the watched step takes longer than a plain one, and the verdict",),
        data=data,
    )
