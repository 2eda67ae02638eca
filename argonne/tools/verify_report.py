"""What the verification script prints: tables of differences, collectives, weights and ways to split."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from argonne.tools.model_sources import REFERENCE_VOCAB_SIZE, ModelSource
from argonne.tp.costs import SplitCost, calls, payload, readable_bytes
from argonne.tp.slices import SliceMap
from argonne.tp.strategies import all_splits
from argonne.verification.simulate import Comparison, Measured


def print_heading(
    source: ModelSource,
    model: nn.Module,
    batch: tuple[int, int],
    size: int,
    seed: int,
    *,
    sequence_parallel: bool,
) -> None:
    """What is checked: the source's model, on ``size`` ranks, with a batch of (sequences, tokens)."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mode = ", sequence parallel" if sequence_parallel else ""
    print(f"{source.label} over {size} ranks{mode}, simulated in one process")
    print(f"  {source.describe()}; {parameters:,} parameters")
    weights = "weights of the checkpoint" if source.checkpoint else f"random weights (seed {seed})"
    print(f"  {weights}, batch of {batch[0]} x {batch[1]} tokens")


def print_comparison(title: str, results: dict[str, Comparison]) -> None:
    """The table of outputs, loss and gradients; a row for each kind of parameter, its worst layer."""
    print(f"\n{title}")
    print(f"  {'':38}" + "".join(f"{name + ' max diff':>15}{'relative':>12}" for name in results))
    rows: dict[str, list[tuple[float, float]]] = {}
    for comparison in results.values():
        kinds: dict[str, tuple[float, float]] = {}
        for one in (comparison.logits, comparison.loss, *comparison.gradients):
            kind = re.sub(r"\.\d+\.", ".*.", one.name)
            kind = "outputs (logits)" if kind == "logits" else kind
            before = kinds.get(kind, (0.0, 0.0))
            kinds[kind] = (max(before[0], one.maximum), max(before[1], one.relative))
        for kind, values in kinds.items():
            rows.setdefault(kind, []).append(values)
    for kind, columns in rows.items():
        label = kind if kind in ("outputs (logits)", "loss") else f"d {kind}"
        print(f"  {label:38}" + "".join(f"{most:15.2e}{relative:12.2e}" for most, relative in columns))


def print_collectives(measured: Measured, expected: SplitCost, unit: int) -> bool:
    """Counted against the formula, ``unit`` being the bytes of one activation; whether they are the same."""
    print("\nCollectives of one rank, counted in fp32 (and by formula)")
    same = True
    for label, counted, formula in (
        ("forward", measured.forward, expected.forward),
        ("step", measured.step, expected.step),
    ):
        equal = counted == formula
        same = same and equal
        verdict = "as by formula" if equal else f"BY FORMULA {describe_traffic(formula)}"
        print(f"  {label:8} {describe_traffic(counted)}: {verdict}")
    print(f"  each entrance and exit of a block carries {unit:,} bytes")
    return same


def describe_traffic(traffic: dict[str, tuple[int, int]]) -> str:
    """``9 all-reduce (259,072 bytes), ...``."""
    parts = [
        f"{count} {kind.replace('_', '-')} ({size:,} bytes)"
        for kind, (count, size) in sorted(traffic.items())
    ]
    return ", ".join(parts) or "none"


def print_weights(slice_map: SliceMap, size: int) -> None:
    """How many weights each rank holds and how many of them are copies or padding."""
    total = slice_map.numel()
    print(f"\nWeights: {total:,} in all, {total / size:,.0f} by {size} ranks evenly")
    for rank in range(size):
        held = sum(math.prod(slice_map.local_shape(name, rank)) for name in slice_map.names)
        owned = sum(box.numel for name in slice_map.names for box in slice_map.owned(name, rank))
        print(f"  rank {rank} holds {held:,}, {owned:,} of them its own, the rest copies and padding")


def print_splits(title: str, splits: Sequence[SplitCost]) -> None:
    """The ways to put the same model on the same ranks."""
    print(f"\n{title}")
    head = f"{'weights/rank':>14}{'states':>10}{'forward':>9}{'step':>6}{'payload/step':>14}{'sent/rank':>11}"
    print(f"  {'':27}{head}")
    for split in splits:
        print(
            f"  {split.name:27}{split.parameters_per_rank:>14,}{readable_bytes(split.state_bytes):>10}"
            f"{calls(split.forward):>9}{calls(split.step):>6}{readable_bytes(payload(split.step)):>14}"
            f"{readable_bytes(split.sent_bytes):>11}"
        )
    print("  collectives (or sends) of the forward pass and of the step; what they wait for, and the source:")
    for split in splits:
        remark = f" ({split.remark})" if split.remark else ""
        words = f"{split.waits}{remark}; {split.source}"
        lines = textwrap.wrap(words, 70)
        print(f"  {split.name:27}{lines[0]}", *lines[1:], sep=f"\n{'':29}")


def print_full_model(asked: ModelSource, size: int) -> None:
    """The table of splits for the model that was made narrow, at the size it trains at."""
    settings = dict(asked.settings)
    if settings["vocab_size"] < REFERENCE_VOCAB_SIZE and asked.label != "config.json":
        settings["vocab_size"] = REFERENCE_VOCAB_SIZE
    full = replace(asked, settings=settings)
    tokens = (4, settings["max_position_embeddings"])
    print_splits(
        f"{full.label} in full ({settings['vocab_size']:,} ids) on {size} ranks, {tokens[0]} x {tokens[1]} "
        "tokens, 16-bit activations",
        all_splits(full.build_empty(), size, tokens, 2),
    )


def print_verdict(problems: Sequence[str], largest: float) -> None:
    """Whether the models are the same, and the largest difference."""
    print("\nModels are NOT equivalent" if problems else "\nModels are mathematically equivalent")
    print(f"Max difference: {largest:.2e}")
    if not problems:
        print("(the largest of any output, loss or gradient element in fp32; fp64 shows that it is rounding)")
