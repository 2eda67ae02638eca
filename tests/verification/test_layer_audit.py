"""A layer of a training step beside its recomputation: it holds in every layout, and each fault is named."""

import math
from typing import Any

import pytest
import torch

from argonne.testing.distributed import run_ranks
from argonne.training.audit import Verdict
from argonne.verification.layer_audit import Compared, furthest, worst_row
from tests.verification.audit_ranks import ALL_SWITCHES, LAYER, Audited, audit_rank, build, faulty_rank

FULL: dict[str, Any] = {"settings": ALL_SWITCHES}
BLOCK = f"blocks.{LAYER}"


def of(tensor: str, rank: int, excess: float, *, own: bool = False) -> Compared:
    return Compared(tensor=tensor, ranks=(rank,), error=excess * 0.01, limit=0.01, own=own)


def test_one_wrong_row_is_as_wrong_as_many() -> None:
    truth = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = truth.clone()
    assert worst_row(actual, truth) == 0
    actual[7] *= 0.5
    assert worst_row(actual, truth).item() == pytest.approx(0.5, rel=0.3)
    actual[7, 3] = math.nan
    assert not math.isfinite(worst_row(actual, truth).item())
    zeros = torch.zeros(4, 4)
    assert worst_row(zeros, zeros) == 0 and math.isinf(worst_row(zeros + 1, zeros).item())


def test_the_rank_that_stands_out_is_named() -> None:
    """What everyone has wrong after a reduction comes after what one rank has."""
    everyone = [of("output of blocks.1", rank, 900.0) for rank in range(3)]
    slices = [of("gradient of o", rank, excess, own=True) for rank, excess in enumerate((5.0, 60.0, 6.0))]
    assert furthest([*everyone, *slices]) == slices[1]
    positions = [of("output of blocks.1", rank, excess) for rank, excess in enumerate((900.0, 0.1, 0.1))]
    assert furthest([*positions, *slices]) == slices[1]
    assert furthest([*positions, *(of("gradient of o", rank, 0.5, own=True) for rank in range(3))]).ranks == (
        0,
    )
    named = furthest(everyone)
    assert named.tensor == "output of blocks.1" and named.ranks == (0, 1, 2)
    fine = [of("a", 0, 0.2), of("b", 1, 0.9), of("c", 0, 0.3)]
    assert furthest(fine) == fine[1]
    given = Compared(tensor="input of blocks.1", ranks=(2,), error=1e-7, limit=1e-12, own=True)
    assert furthest([*everyone, given]) == given


def held(ranks: list[Audited], oracle: int, tp_size: int) -> None:
    """All ranks agree that all was within its limits, and only the oracles compared something."""
    for rank, audited in enumerate(ranks):
        verdict = audited.verdict
        assert verdict == ranks[0].verdict and verdict is not None
        assert not verdict.fault and verdict.off == 0 and verdict.worst is not None, verdict
        assert bool(audited.found) == (rank % tp_size == oracle)
    tensors = {one.tensor for one in ranks[oracle].found}
    names = build(0, 1, 1, {}, **FULL).model.blocks[LAYER].state_dict()
    assert {f"gradient of {BLOCK}.{name}" for name in names} <= tensors
    assert {f"{name} of {BLOCK}" for name in ("input", "output", "gradient of the input")} <= tensors


LAYOUTS = [
    (1, 1, {}, {"compiled": True}),
    (2, 2, {}, {"oracle": 1, "documents": True}),
    (2, 2, {"block_size": 15}, {"sequence_parallel": True, "accumulation": 2}),
    (2, 1, {}, {"accumulation": 2}),
    (2, 2, {"dtype": "bf16"}, {"activation_checkpointing": "full"}),
]
MORE_LAYOUTS = [
    (3, 3, {}, {}),
    (3, 3, {"dtype": "bf16"}, {"sequence_parallel": True}),
    (4, 4, {}, {"settings": {**ALL_SWITCHES, "num_key_value_heads": 2}}),
    (4, 4, {"dtype": "bf16"}, {"sequence_parallel": True, "oracle": 3}),
    (4, 2, {"dtype": "bf16"}, {"activation_checkpointing": "selective"}),
    (4, 2, {}, {"data_parallel": "ddp", "accumulation": 2}),
    (2, 1, {"dtype": "fp16"}, {"compiled": True}),
    (2, 2, {"dtype": "fp16"}, {"compiled": True, "sequence_parallel": True}),
]


@pytest.mark.parametrize(
    ("world_size", "tp_size", "training", "options"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)],
)
def test_every_layout_holds(
    world_size: int, tp_size: int, training: dict[str, Any], options: dict[str, Any]
) -> None:
    given = {**FULL, **options}
    if world_size == 1:
        ranks = [audit_rank(0, 1, 1, training, given)]
    else:
        ranks = run_ranks(audit_rank, world_size, tp_size, training, given)
    held(ranks, options.get("oracle", 0), tp_size)


def verdict_on(name: str, culprit: int, *, world_size: int = 2, tp_size: int = 2, **options: Any) -> Verdict:
    """Of a fault on one rank; all ranks have the same."""
    if world_size == 1:
        ranks = [faulty_rank(0, 1, 1, name, culprit, options)]
    else:
        ranks = run_ranks(faulty_rank, world_size, tp_size, name, culprit, options)
    verdict = ranks[0].verdict
    assert verdict is not None and verdict.fault
    assert all(other.verdict == verdict for other in ranks)
    return verdict


@pytest.mark.parametrize(
    ("name", "culprit", "options"),
    [
        ("attention", 1, {}),
        ("attention", 1, {"sequence_parallel": True}),
        ("attention", 1, {"oracle": 1}),
        ("product", 1, {"oracle": 1}),
        ("activation", 1, {}),
        ("compiled", 0, {"world_size": 1, "tp_size": 1, "compiled": True}),
        pytest.param("compiled", 1, {"compiled": True}, marks=pytest.mark.slow),
        pytest.param("attention", 0, {"training": {"dtype": "bf16"}}, marks=pytest.mark.slow),
        pytest.param("product", 2, {"world_size": 4, "tp_size": 2}, marks=pytest.mark.slow),
        pytest.param("attention", 3, {"world_size": 4, "tp_size": 4, "oracle": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_wrong_kernel_block_or_number_is_named_with_its_rank(
    name: str, culprit: int, options: dict[str, Any]
) -> None:
    verdict = verdict_on(name, culprit, **options)
    assert verdict.worst is not None and verdict.worst.excess > 1.0
    assert verdict.worst.ranks == (culprit,), verdict
    assert BLOCK in verdict.worst.tensor and f"on rank {culprit} is off by " in verdict.fault
    assert "recomputed by rank " in verdict.fault


def test_a_flipped_bit_of_a_weight_is_seen_where_the_weight_lay_at_rest() -> None:
    """The lowest bit, which no recomputation could see: every slice that is gathered has it."""
    verdict = verdict_on("weight", 1, when="at rest")
    assert f"{BLOCK}.mlp.gate_proj.weight on rank 1 changed between the step before and this" in verdict.fault


def test_a_copy_that_differs_is_seen_whenever_it_went_astray() -> None:
    verdict = verdict_on("norm", 1, when="earlier")
    assert f"{BLOCK}.post_norm.weight on rank 1 is not the copy that rank 0 holds" in verdict.fault
