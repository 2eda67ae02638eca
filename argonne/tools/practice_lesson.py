"""What the practice lesson says, in order, and the numbers it says it with."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from argonne.tools.practice_layers import (
    BATCH,
    FEATURES,
    HEAD_DIM,
    HIDDEN,
    KEY_VALUE_HEADS,
    QUERY_HEADS,
    SEQ_LEN,
    Pair,
    Trial,
    attention_pair,
    linear_pair,
    mlp_pair,
    naive_mlp_pair,
    run,
)
from tp_shard import TPGroup

TOLERANCE = 1e-5
"""Largest relative difference in float32; a fault of a split shows as 1e-1 and more."""
_WIDTH = 96

FromAll = Callable[[Any], list[Any]]
"""Collects an object from every rank, in rank order, on every rank."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the lesson: a block, and what is said about it."""

    title: str
    text: str
    build: Pair
    shown: dict[str, str]
    """Heading -> which shape of a rank stands under it: a parameter, or an output as "-> name"."""
    owned: Callable[[int, int], str]
    """(rank, number of ranks) -> which of the unsharded features or heads are this rank's."""
    forward: str
    """What the collectives of the forward pass carry."""
    backward: str


def _features(rank: int, size: int) -> str:
    local = FEATURES // size
    return f"features {rank * local}:{(rank + 1) * local}"


def _heads(rank: int, size: int) -> str:
    query, key_value = QUERY_HEADS // size, KEY_VALUE_HEADS // size
    return f"q {rank * query}:{(rank + 1) * query}, k/v {rank * key_value}:{(rank + 1) * key_value}"


PARTS = (
    Part(
        title="A linear layer: column-parallel, its output gathered",
        text="y = x W^T + b. Each rank has all of x and some rows of W, and computes some features of y; an "
        "all-gather puts them side by side, on every rank.",
        build=linear_pair,
        shown={"W": "weight", "b": "bias", "y gathered": "-> "},
        owned=_features,
        forward="the parts of y",
        backward="d x: what came through each rank's features, summed",
    ),
    Part(
        title="An MLP: column-parallel, then row-parallel, and nothing is gathered",
        text="y = down(silu(gate(x)) * up(x)). A rank keeps its features of gate and up, and holds just the "
        "columns of down that multiply them. So it ends with a partial sum of all of y, which one "
        "all-reduce at the exit completes. One entrance for gate and up does nothing forward and completes "
        "d x backward. The bias of down is whole on every rank and added once, after the sum.",
        build=mlp_pair,
        shown={"gate, up": "gate.weight", "gives": "-> gate", "down": "down.weight", "its bias": "down.bias",
               "y": "-> "},
        owned=_features,
        forward="the exit: partial sums of y",
        backward="the entrance: partial sums of d x",
    ),
    Part(
        title="An attention block: whole heads on each rank",
        text="y = x + o(attention(q, k, v)) of the normed x. Heads do not need each other, so a rank "
        "computes its query heads with the key/value heads that they use, and nothing is sent until o, which "
        "is row-parallel. The norm is outside the region and whole on every rank. Its gradient needs no "
        "sending: the entrance, which stands behind it, has completed what reaches it.",
        build=attention_pair,
        shown={"q": "q.weight", "k, v": "k.weight", "o": "o.weight", "norm": "norm.weight", "y": "-> "},
        owned=_heads,
        forward="the exit: partial sums",
        backward="the entrance: partial sums of the gradient of the normed x",
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# The lesson


def teach(group: TPGroup, device: torch.device, seed: int, from_all: FromAll, say: Say) -> list[str]:
    """The whole lesson, on one rank of ``group``; returns what differs, the same on every rank."""
    introduce(group, device, from_all, say)
    trials: dict[Pair, list[Trial]] = {}
    problems = []
    for number, part in enumerate(PARTS, start=1):
        trials[part.build] = from_all(run(part.build, group, device, seed))
        show(number, part, trials[part.build], say)
        problems += differences(part.title, trials[part.build])
        if part.build is mlp_pair:
            naive = from_all(run(naive_mlp_pair, group, device, seed))
            compare_naive(naive, trials[mlp_pair], say)
            problems += differences("the MLP with every layer gathered", naive)
    without_entrance = functools.partial(attention_pair, with_entrance=False)
    wrong = from_all(run(without_entrance, group, device, seed))
    problems += show_mistake(len(PARTS) + 1, wrong, trials[attention_pair], say)
    say("")
    say(
        "All outputs and gradients are those of the unsharded layers" if not problems else "Something DIFFERS"
    )
    worst = max(max(trial.maximum for trial in kept) for kept in trials.values())
    say(f"Max difference: {worst:.2e}")
    return problems


def introduce(group: TPGroup, device: torch.device, from_all: FromAll, say: Say) -> None:
    """The process group, and one all-reduce to see it work."""
    own = torch.tensor([float(group.rank + 1)], device=device)
    total = group.all_reduce(own.clone())
    backend = "NCCL" if device.type == "cuda" else "gloo"
    say(f"Tensor parallelism on {group.size} ranks, over {backend}")
    say("")
    say("0. The process group")
    _paragraph(
        "Every rank runs the same code with another slice of the weights. They know of each other through "
        "the group only: in a collective each puts in a tensor and all get a result.",
        say,
    )
    for rank, (pid, where, before, after) in enumerate(
        from_all((os.getpid(), str(device), own.item(), total.item()))
    ):
        say(f"   rank {rank}   process {pid} on {where}: puts in {before:.0f}, all-reduce gives {after:.0f}")
    _paragraph(
        f"Below, x is (batch, sequence, hidden) = ({BATCH}, {SEQ_LEN}, {HIDDEN}) and the same on every "
        f"rank; {FEATURES} features inside, {QUERY_HEADS} query and {KEY_VALUE_HEADS} key/value heads of "
        f"{HEAD_DIM}. A weight is (outputs, inputs). Differences are ||split - unsharded|| / ||unsharded||, "
        "in float32.",
        say,
    )


def show(number: int, part: Part, trials: Sequence[Trial], say: Say) -> None:
    """What each rank holds, what is sent, and how far it is from the unsharded block."""
    say("")
    say(f"{number}. {part.title}")
    _paragraph(part.text, say)
    rows = [["", "holds", *part.shown]]
    for trial in trials:
        shapes = [trial.shape(what) for what in part.shown.values()]
        rows.append([f"rank {trial.rank}", part.owned(trial.rank, len(trials)), *map(str, shapes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        say(("   " + "   ".join(cells)).rstrip())
    say(f"   forward    {traffic(trials[0].forward)} ({part.forward})")
    say(f"   backward   {traffic(trials[0].backward)} ({part.backward})")
    for line in error_lines(trials):
        say(line)


def compare_naive(naive: Sequence[Trial], paired: Sequence[Trial], say: Say) -> None:
    """What the pairing has saved."""
    calls = [_calls(trial.forward) + _calls(trial.backward) for trial in (naive[0], paired[0])]
    say("   Had each of the three layers been split for itself, as in part 1:")
    say(f"   forward    {traffic(naive[0].forward)}")
    say(f"   backward   {traffic(naive[0].backward)}")
    say(f"   The result would be the same, with {calls[0]} collectives instead of {calls[1]}.")


def show_mistake(number: int, wrong: Sequence[Trial], right: Sequence[Trial], say: Say) -> list[str]:
    """The block without its entrance: a right output, wrong gradients. A problem if that cannot be seen."""
    say("")
    say(f"{number}. The mistake that no output shows")
    _paragraph(
        "The same attention block, its entrance forgotten: nobody completes the gradient where the region "
        "begins. Output and loss are right to the last digit, and all that lies below learns from a part of "
        "its gradient. This is why gradients are compared here, and not outputs alone.",
        say,
    )
    say(f"   forward    {traffic(wrong[0].forward)}")
    say(f"   backward   {traffic(wrong[0].backward)} (with the entrance: {traffic(right[0].backward)})")
    errors = _worst(wrong)
    for name, what in (("y", "right"), ("d norm.weight", "WRONG"), ("d x", "WRONG")):
        say(f"   {name:14} off by {errors[name]:.1e}: {what}")
    if errors["y"] > TOLERANCE or min(errors["d norm.weight"], errors["d x"]) < 100 * TOLERANCE:
        return ["the forgotten entrance did not show in the gradients alone"]
    return []


# ---------------------------------------------------------------------------------------------------
# Lines


def _paragraph(words: str, say: Say) -> None:
    for line in textwrap.wrap(words, _WIDTH - 3, break_on_hyphens=False):
        say(f"   {line}")


def _calls(counted: dict[str, tuple[int, int]]) -> int:
    return sum(calls for calls, _ in counted.values())


def traffic(counted: dict[str, tuple[int, int]]) -> str:
    """``1 all-reduce, 5,120 bytes``."""
    parts = [
        f"{calls} {kind.replace('_', '-')}{'s' * (calls > 1)}, {size:,} bytes"
        for kind, (calls, size) in sorted(counted.items())
    ]
    return " and ".join(parts) or "nothing"


def _worst(trials: Sequence[Trial]) -> dict[str, float]:
    """Each difference, of the rank where it is largest."""
    return {name: max(trial.errors[name] for trial in trials) for name in trials[0].errors}


def error_lines(trials: Sequence[Trial]) -> list[str]:
    """The verdict and all differences."""
    errors = _worst(trials)
    agrees = all(error <= TOLERANCE for error in errors.values())
    listed = ", ".join(f"{name} {error:.1e}".replace(" ", "\0") for name, error in errors.items())
    words = f"{'agrees with' if agrees else 'DIFFERS from'} the unsharded layers: off by {listed}"
    lines = textwrap.wrap(words, _WIDTH, initial_indent="   ", subsequent_indent="      ")
    return [line.replace("\0", " ") for line in lines]


def differences(title: str, trials: Sequence[Trial]) -> list[str]:
    """What is beyond tolerance, in words."""
    return [
        f"{title}: {name} is off by {error:.1e} (tolerance {TOLERANCE:.0e})"
        for name, error in _worst(trials).items()
        if not error <= TOLERANCE
    ]
