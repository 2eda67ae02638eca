"""What the audit of a layer costs: over two ranks, beside the steps between two audits."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch.distributed as dist

from argonne.benchmarks.common import Report, Row, interleaved, summary
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
    """Seconds of a plain step, of an audited one, and of the verdict after it."""
    shape = SHAPES[name]
    parallel = dataclasses.replace(split_over(world_size), control_group=dist.group.WORLD)
    trained = our_model(shape, parallel)
    step = TrainingStep(trained, training_options(shape), 1)
    batch = StepBatch(tokens=shape.tokens(), stream_hash="", progress=None, wait_seconds=0.0)
    verdicts: list[float] = []
    numbers = iter(range(1_000_000))

    def plain() -> float:
        dist.barrier()
        start = time.perf_counter()
        step.run(batch, 0, votes=Votes())
        return time.perf_counter() - start

    def audited() -> float:
        turn = Turn.of(next(numbers), shape.layers, world_size)
        dist.barrier()
        start = time.perf_counter()
        rest = checksums(dict(trained.model.blocks[turn.layer].named_parameters()))
        tap = BlockTap(trained.model, turn.layer)
        step.run(batch, 0, votes=Votes())
        tap.remove()
        middle = time.perf_counter()
        verdict = judge(trained, tap, turn.oracle, rest)
        assert verdict is not None and not verdict.fault, verdict
        verdicts.append(time.perf_counter() - middle)
        return time.perf_counter() - start

    seconds = interleaved({"plain": plain, "audited": audited}, rounds)
    return {**seconds, "verdict": verdicts[-rounds:]}


def row_of(name: str, ranks: list[dict[str, list[float]]]) -> tuple[Row, dict[str, Any]]:
    """The share that audits take, each as long as on its slowest rank."""
    slowest = {key: [max(both) for both in zip(*(r[key] for r in ranks), strict=True)] for key in ranks[0]}
    plain, audited = min(slowest["plain"]), min(slowest["audited"])
    label = f"{name}: what an audit adds / the {INTERVAL} steps between two"
    row = Row(name=label, ours=audited - plain, peer=INTERVAL * plain, unit="s", target=MOST)
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
        remarks=(f"at the default --audit-interval {INTERVAL}; every other interval in proportion",),
        data=data,
    )
