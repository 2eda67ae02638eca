"""Memory of a rank, exactly: parameters, and the activations that a layer keeps for the backward pass."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist

from argonne.benchmarks.activations import saved_bytes, saved_bytes_without_loss
from argonne.benchmarks.common import ROUNDS, Report, Row
from argonne.benchmarks.models import SHAPES, Shape, our_model, peer_model, split_over, split_peer
from argonne.config.presets import PRESETS, REFERENCE
from argonne.testing.distributed import run_ranks
from argonne.tp.architectures import plan_for
from argonne.tp.costs import ModelOutline, activation_bytes
from argonne.tp.plan import build_slice_map
from model import ArgonneConfig, ArgonneModel

RANKS = 2
FEW, MANY = 2, 4
"""Layers of two models, whose difference is what layers keep (embedding, head and loss cancel out)."""


def reference_model(vocab_size: int = 151665) -> ArgonneModel:
    """Argonne 2.0 on the meta device."""
    with torch.device("meta"):
        return ArgonneModel(ArgonneConfig(**PRESETS[REFERENCE], vocab_size=vocab_size))


def parameter_row(tp_size: int) -> Row:
    """Parameters on the fullest rank against an even share."""
    model = reference_model()
    slice_map = build_slice_map(model, plan_for(model), tp_size)
    held = max(
        sum(math.prod(slice_map.tp_local_shape(name, rank)) for name in slice_map.names)
        for rank in range(tp_size)
    )
    name = f"parameters per rank, Argonne 2.0, tp {tp_size} / even share"
    return Row(name=name, ours=held, peer=slice_map.numel() / tp_size, unit="", target=1.01)


def per_layer(counts: dict[int, int]) -> float:
    return (counts[MANY] - counts[FEW]) / (MANY - FEW)


def saved_rank(rank: int, world_size: int, shape: Shape) -> dict[str, dict[int, int]]:
    """Bytes kept on this rank at two depths: ours, ours with sequence parallelism, DTensor's."""
    tokens = shape.tokens().long()
    kept: dict[str, dict[int, int]] = {"plain": {}, "sequence": {}, "dtensor": {}}
    for layers in (FEW, MANY):
        deep = dataclasses.replace(shape, layers=layers)
        parallel = split_over(world_size)
        assert parallel.mesh is not None
        ours = our_model(deep, parallel)
        kept["plain"][layers] = saved_bytes(ours.model, tokens)
        llama = split_peer(peer_model(deep, ours), parallel.mesh["tp"])
        kept["dtensor"][layers] = saved_bytes_without_loss(llama, tokens[:, :-1])
        ours = our_model(deep, parallel, sequence_parallel=True)
        kept["sequence"][layers] = saved_bytes(ours.model, tokens)
        dist.barrier()
    return kept


def formula(shape: Shape, *, sequence_parallel: bool) -> float:
    """float32 bytes of one layer by ``argonne.tp.costs.activation_bytes`` (which counts 16-bit ones)."""
    totals = {}
    for layers in (FEW, MANY):
        with torch.device("meta"):
            model = ArgonneModel(ArgonneConfig(**{**shape.settings(), "num_hidden_layers": layers}))
        tokens = shape.batch * shape.seq_len
        outline = ModelOutline.of(model)
        totals[layers] = 2 * activation_bytes(outline, tokens, RANKS, sequence_parallel=sequence_parallel)
    return per_layer(totals)


def activation_rows() -> tuple[list[Row], dict[str, Any]]:
    shape = SHAPES["h512"]
    kept = run_ranks(saved_rank, RANKS, shape)[0]
    plain, sequence, dtensor = (per_layer(kept[key]) for key in ("plain", "sequence", "dtensor"))
    rows = [
        Row(
            name="saved activations of a layer, tp 2 / formula",
            ours=plain, peer=formula(shape, sequence_parallel=False), unit="B", target=1.02,
        ),
        Row(
            name="saved activations of a layer, tp 2 with sequence parallelism / formula",
            ours=sequence, peer=formula(shape, sequence_parallel=True), unit="B", target=1.02,
        ),
        Row(name="saved activations of a layer, tp 2 / DTensor tp 2", ours=plain, peer=dtensor, unit="B"),
        Row(
            name="saved activations of a layer, sequence parallel / DTensor without it",
            ours=sequence, peer=dtensor, unit="B",
        ),
    ]  # fmt: skip
    return rows, {"kept": kept}


def run(rounds: int = ROUNDS) -> Report:
    rows, data = activation_rows()
    return Report(
        name="memory",
        title="Memory of a rank, counted",
        rows=(*(parameter_row(size) for size in (2, 4, 8)), *rows),
        remarks=(
            "Activations: bytes of the storages autograd keeps, each once, parameters left out, float32, "
            "hidden 512, 512 tokens; the difference of 4 and 2 layers: embedding, head and loss cancel.",
            "Formula: activation_bytes of argonne/tp/costs.py (Korthikanti et al. 2022, section 4).",
        ),
        data=data,
    )
