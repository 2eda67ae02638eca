"""One optimizer step: over two ranks against PyTorch's DTensor, and against one process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import argonne.tp.cpu_products as cpu_products
from argonne.benchmarks.common import ROUNDS, Report, Row, interleaved, summary, timed_row
from argonne.benchmarks.models import (
    SHAPES,
    alone,
    our_model,
    our_step,
    peer_model,
    peer_step,
    split_over,
    split_peer,
)
from argonne.testing.distributed import run_ranks

RANKS = 2
FRESH = ("ours tp2", "dtensor tp2", "dtensor tp2 naive", "ours 1 thread", "llama 1 thread")
"""Variants with a model of their own; the others go on with one of these."""
TARGETS = {"h512": 0.75, "h768": 0.80}


def _threads(step: Callable[[], float], count: int) -> Callable[[], float]:
    def run() -> float:
        torch.set_num_threads(count)
        try:
            return step()
        finally:
            torch.set_num_threads(1)

    return run


def _torch_products(step: Callable[[], float]) -> Callable[[], float]:
    """The same step with torch's own matrix products instead of oneDNN's."""

    def run() -> float:
        before, cpu_products.LEAST_FLOPS = cpu_products.LEAST_FLOPS, sys.maxsize
        try:
            return step()
        finally:
            cpu_products.LEAST_FLOPS = before

    return run


def step_rank(rank: int, world_size: int, name: str, rounds: int) -> dict[str, Any]:
    """Seconds and CPU seconds of each variant in each round, on this rank, and the first losses."""
    shape = SHAPES[name]
    parallel = split_over(world_size)
    assert parallel.mesh is not None
    ours = our_model(shape, parallel)
    mesh = parallel.mesh["tp"]
    steps: dict[str, Callable[[], float] | None] = {
        "ours tp2": our_step(ours, shape),
        "dtensor tp2": peer_step(split_peer(peer_model(shape, ours), mesh), shape),
        "dtensor tp2 naive": peer_step(split_peer(peer_model(shape, ours), mesh, naive=True), shape),
    }
    llama = peer_model(shape, ours)  # collective
    one = our_step(our_model(shape, alone()), shape) if rank == 0 else None
    peer = peer_step(llama, shape) if rank == 0 else None
    steps["ours 1 thread"] = one
    if cpu_products.onednn_is_used():
        steps["ours tp2, torch's products"] = _torch_products(our_step(ours, shape))
        steps["ours 1 thread, torch's products"] = None if one is None else _torch_products(one)
    steps["ours 2 threads"] = None if one is None else _threads(one, 2)
    steps["llama 1 thread"] = peer
    steps["llama 2 threads"] = None if peer is None else _threads(peer, 2)

    losses: dict[str, float] = {}
    cpu: dict[str, list[float]] = {variant: [] for variant in steps}

    def timed(variant: str) -> Callable[[], float]:
        step = steps[variant]

        def run() -> float:
            dist.barrier()
            used, start = time.process_time(), time.perf_counter()
            loss = step() if step is not None else 0.0
            seconds = time.perf_counter() - start
            cpu[variant].append(time.process_time() - used)
            losses.setdefault(variant, loss)
            dist.barrier()  # a variant of one process leaves the other rank asleep here
            return seconds

        return run

    seconds = interleaved({variant: timed(variant) for variant in steps}, rounds)
    return {"seconds": seconds, "cpu": {k: v[-rounds:] for k, v in cpu.items()}, "losses": losses}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Both ranks together: a step takes as long as its slowest rank, and the CPU time of all."""
    ranks = run_ranks(step_rank, RANKS, name, rounds, timeout=600)
    variants = ranks[0]["seconds"]
    losses = ranks[0]["losses"]
    for variant, loss in losses.items():
        if variant in FRESH:
            assert abs(loss - losses["ours tp2"]) < 1e-4 * loss, f"{variant} trains another model: {losses}"
    return {
        "seconds": {
            variant: [max(pair) for pair in zip(*(r["seconds"][variant] for r in ranks), strict=True)]
            for variant in variants
        },
        "cpu": {
            variant: [sum(pair) for pair in zip(*(r["cpu"][variant] for r in ranks), strict=True)]
            for variant in variants
        },
        "losses": losses,
    }


def rows_of(name: str, seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> list[Row]:
    ours, one = seconds["ours tp2"], seconds["ours 1 thread"]
    speed_up: dict[str, Any] = {"inverse": True, "at_least": True}
    first: list[Row] = []
    if "ours tp2, torch's products" in seconds:
        # Torch's own products first: what the split itself gives. OneDNN's gain is the processor's.
        plain, plain_one = seconds["ours tp2, torch's products"], seconds["ours 1 thread, torch's products"]
        first = [
            timed_row(f"{name}: tp 2 / DTensor tp 2, torch's own products", plain, seconds["dtensor tp2"]),
            timed_row(f"{name}: speed-up of tp 2 over 1, torch's own products", plain, plain_one, **speed_up),
        ]
    return [
        *first,
        timed_row(f"{name}: tp 2 / DTensor tp 2", ours, seconds["dtensor tp2"], target=TARGETS[name]),
        timed_row(f"{name}: speed-up of tp 2 over 1 process, 1 thread", ours, one, target=1.75, **speed_up),
        timed_row(f"{name}: tp 2 / DTensor tp 2, CPU seconds", cpu["ours tp2"], cpu["dtensor tp2"]),
        timed_row(f"{name}: tp 2 / naive DTensor tp 2", ours, seconds["dtensor tp2 naive"]),
        timed_row(
            f"{name}: speed-up of tp 2, CPU seconds of a rank",
            [both / RANKS for both in cpu["ours tp2"]],
            cpu["ours 1 thread"],
            inverse=True,
        ),
        timed_row(f"{name}: tp 2 / 1 process, 2 threads", ours, seconds["ours 2 threads"], target=1.15),
        timed_row(f"{name}: 1 process, ours / Llama, 1 thread", one, seconds["llama 1 thread"]),
        timed_row(
            f"{name}: 1 process, ours / Llama, 2 threads",
            seconds["ours 2 threads"],
            seconds["llama 2 threads"],
        ),
    ]


def run(rounds: int = ROUNDS, shapes: tuple[str, ...] = tuple(SHAPES)) -> Report:
    rows: list[Row] = []
    data: dict[str, Any] = {}
    for name in shapes:
        measured = measure(name, rounds)
        rows += rows_of(name, measured["seconds"], measured["cpu"])
        data[name] = {
            kind: {variant: summary(values) for variant, values in measured[kind].items()}
            for kind in ("seconds", "cpu")
        } | {"losses": measured["losses"]}
    return Report(
        name="step",
        title=f"One optimizer step, 512 tokens, float32, gloo: minima of {rounds} rounds",
        rows=tuple(rows),
        remarks=(
            "A step is forward, backward, clipping by the global norm and AdamW, in all variants.",
            "Matrix products: "
            + (
                "oneDNN's on our side, as in a run on this processor, but in the rows that say otherwise."
                if cpu_products.onednn_is_used()
                else "torch's own on both sides, as in a run on this processor."
            ),
            "CPU seconds are those of both ranks together; they do not see who else used the machine.",
        ),
        data=data,
    )
