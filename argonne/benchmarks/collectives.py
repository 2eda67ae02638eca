"""Collectives of one forward and backward pass, counted: against the formula and against DTensor's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

from argonne.benchmarks.common import ROUNDS, Report, Row
from argonne.benchmarks.models import SHAPES, our_model, peer_model, split_over, split_peer
from argonne.ranks.replicas import local_gradients
from argonne.testing.distributed import run_ranks
from argonne.tp.costs import ModelOutline, SplitCost, tensor_parallel
from model import ArgonneConfig, ArgonneModel

RANKS = 2
SHAPE = SHAPES["h512"]
Counts = dict[str, tuple[int, int]]


def _ours(parallel: Any, sequence_parallel: bool) -> Counts:
    """Calls and payload bytes by kind of one micro-batch, and of what a step completes after it."""
    trained = our_model(SHAPE, parallel, sequence_parallel=sequence_parallel)
    state, tokens = trained.tensor_parallel, SHAPE.tokens().long()
    state.group.counters.reset()
    trained.model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    state.sum_partial_gradients(local_gradients(trained.model))
    counters = state.group.counters
    return {kind: (count, counters.bytes[kind]) for kind, count in counters.calls.items() if count}


def _dtensor(parallel: Any, naive: bool) -> dict[str, int]:
    """Calls by operator of DTensor's forward, loss and backward, as its own debug mode counts them."""
    ours = our_model(SHAPE, parallel)
    llama = split_peer(peer_model(SHAPE, ours), parallel.mesh["tp"], naive=naive)
    tokens = SHAPE.tokens().long()
    with CommDebugMode() as mode, loss_parallel(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the debug mode's own hooks
        logits = llama(input_ids=tokens[:, :-1], use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    return {str(operator): count for operator, count in mode.get_comm_counts().items()}


def count_rank(rank: int, world_size: int) -> dict[str, Any]:
    parallel = split_over(world_size)
    return {
        "plain": _ours(parallel, False),
        "sequence": _ours(parallel, True),
        "dtensor": _dtensor(parallel, False),
        "naive": _dtensor(parallel, True),
    }


def expected(*, sequence_parallel: bool) -> SplitCost:
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**SHAPE.settings()))
    outline = ModelOutline.of(model)
    tokens = (SHAPE.batch, SHAPE.seq_len)
    return tensor_parallel(
        outline, model, RANKS, tokens, 4, sequence_parallel=sequence_parallel, loss_in_chunks=True
    )


def _calls(counts: Counts) -> int:
    return sum(count for count, _ in counts.values())


def _bytes(counts: Counts) -> int:
    return sum(size for _, size in counts.values())


def rows_of(counted: dict[str, Any]) -> list[Row]:
    layers = SHAPE.layers
    plain, sequence = counted["plain"], counted["sequence"]
    gathers, scatters = sequence["all_gather"][0], sequence["reduce_scatter"][0]
    rest = sequence["all_reduce"][0]
    formulas = {key: expected(sequence_parallel=key == "sequence").step for key in ("plain", "sequence")}
    return [
        Row(name="calls / (4 layers + 2, and 2 for the loss)", ours=_calls(plain), peer=4 * layers + 4,
            unit="", target=1.0),
        Row(name="bytes / formula", ours=_bytes(plain), peer=_bytes(formulas["plain"]), unit="B", target=1.0),
        Row(name="sequence parallel: all-gathers / (4 layers + 2 + re-gathers 2 layers)", ours=gathers,
            peer=6 * layers + 2, unit="", target=1.0),
        Row(name="sequence parallel: reduce-scatters / (4 layers + 2)", ours=scatters, peer=4 * layers + 2,
            unit="", target=1.0),
        Row(name="sequence parallel: all-reduces / (2 for the loss, 1 bucket of norm gradients)", ours=rest,
            peer=3, unit="", target=1.0),
        Row(name="sequence parallel: bytes / formula", ours=_bytes(sequence),
            peer=_bytes(formulas["sequence"]), unit="B", target=1.0),
        Row(name="calls / DTensor's", ours=_calls(plain), peer=sum(counted["dtensor"].values()), unit=""),
        Row(name="calls / DTensor's, each layer split for itself", ours=_calls(plain),
            peer=sum(counted["naive"].values()), unit=""),
    ]  # fmt: skip


def run(rounds: int = ROUNDS) -> Report:
    counted = run_ranks(count_rank, RANKS)[0]
    return Report(
        name="collectives",
        title="Collectives on the tensor-parallel group, one micro-batch, tp 2, counted",
        rows=tuple(rows_of(counted)),
        remarks=(
            f"Hidden {SHAPE.hidden_size}, {SHAPE.layers} layers, {SHAPE.batch * SHAPE.seq_len} tokens, "
            "float32. Payload is that of the unsharded side; DTensor's calls as its CommDebugMode sees them.",
            "Outside the group a step adds one all-reduce of five numbers and the broadcast of the tokens.",
        ),
        data=counted,
    )
