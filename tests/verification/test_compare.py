"""The check of a run's split sees what it is for, and nothing else."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argonne.ranks.recompute import recompute_blocks
from argonne.ranks.replicas import apply_ddp, apply_fsdp
from argonne.testing.distributed import run_ranks
from argonne.testing.models import random_tokens, small_model
from argonne.verification.compare import (
    ShardingReport,
    SplitMismatchError,
    compare_with_unsharded,
    relative_error,
)
from argonne.verification.simulate import measure
from tests.model.documents_alone import alone, ids_of, random_spans
from tests.model.family_reference import SWITCHES
from tests.verification.layouts import layout, single_process
from tp_shard import shard_tensor_parallel

FLOAT32_ROUNDING = 1e-5
"""Of a gradient, relatively: up to 3e-6 on the processors seen, which add up products in different orders. A
missing reduction is 4e-1."""


def break_entrance(model: Any) -> None:
    """Forget the attention's reduction in the backward pass: the loss stays right."""
    group = model.tensor_parallel.group
    silent = SimpleNamespace(
        size=group.size,
        rank=group.rank,
        start_all_reduce=lambda tensor, op="sum", owned=False: tensor,
        wait=lambda tensor: tensor,
    )
    for block in model.blocks:
        block.attn.qkv.group = silent


def verified_rank(
    rank: int,
    world_size: int,
    tp_size: int,
    kind: str,
    sequence_parallel: bool,
    dtype: torch.dtype,
    broken: bool,
    changes: dict[str, Any],
) -> ShardingReport | str:
    parallel = layout(rank, world_size, tp_size)
    model = small_model(torch.float32, **changes)
    shard_tensor_parallel(model, parallel.mesh, sequence_parallel=sequence_parallel)
    if broken:
        break_entrance(model)
    wrapped: Any = model
    if kind == "fsdp":
        recompute_blocks(model.blocks, "full")
        apply_fsdp(model, model.blocks, parallel, dtype)
    elif kind == "ddp":
        wrapped = apply_ddp(model, parallel)
    state: Any = model.tensor_parallel
    counters = state.group.counters
    counters.add("all_reduce", 5)
    try:
        report = compare_with_unsharded(model, wrapped, parallel, random_tokens(length=12), dtype=dtype)
    except SplitMismatchError as error:
        return str(error)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert dict(counters.bytes) == {"all_reduce": 5}, "the check changed the run's own counters"
    return report


ALL_SWITCHES = {
    "qk_norm": True,
    "v_norm": True,
    "sandwich_norm": True,
    "logit_softcap": 2.0,
    "z_loss_weight": 0.05,
    "interleaved_local_attention": True,
    "local_attention_window": 3,
}
EACH_SWITCH: list[dict[str, Any]] = [
    {"qk_norm": True},
    {"v_norm": True},
    {"sandwich_norm": True},
    {"logit_softcap": 2.0},
    {"z_loss_weight": 0.05},
    {"interleaved_local_attention": True, "local_attention_window": 3},
]

CASES: list[tuple[int, int, str, bool, torch.dtype, dict[str, Any]]] = [
    *((2, 2, "none", True, torch.float32, switch) for switch in EACH_SWITCH),
    (2, 2, "none", False, torch.float32, ALL_SWITCHES),
    (4, 2, "fsdp", True, torch.float32, {**ALL_SWITCHES, "tie_word_embeddings": False}),
    (2, 2, "none", False, torch.float32, {"attention_bias": True, "mlp_bias": True}),
    (2, 2, "none", True, torch.float32, {"tie_word_embeddings": False}),
    (2, 2, "none", False, torch.bfloat16, {}),
    (2, 1, "fsdp", False, torch.float32, {}),
    (4, 4, "none", True, torch.float32, {"num_key_value_heads": 2, "attention_bias": True}),
    (4, 2, "fsdp", True, torch.float32, {"attention_bias": True}),
    (4, 2, "fsdp", False, torch.bfloat16, {}),
    (4, 2, "ddp", False, torch.float32, {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("world", "tp_size", "kind", "sequence_parallel", "dtype", "changes"), CASES)
def test_a_right_split_agrees_with_the_unsharded_model(
    world: int, tp_size: int, kind: str, sequence_parallel: bool, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    results = run_ranks(verified_rank, world, tp_size, kind, sequence_parallel, dtype, False, changes)
    names = [name for name, _ in small_model(**changes).named_parameters()]
    expected = measure(small_model(torch.float32, **changes), random_tokens(length=12))
    for report in results:
        assert isinstance(report, ShardingReport), report
        assert report == results[0]
        assert [gradient.name for gradient in report.gradients] == names
        assert report.unsharded_loss == pytest.approx(expected.loss, rel=1e-6)
        assert report.worst.relative < (FLOAT32_ROUNDING if dtype is torch.float32 else 0.1)
        assert report.worst.relative > 0 or world == 1


def test_a_missing_reduction_is_seen_on_every_rank() -> None:
    for message in run_ranks(verified_rank, 2, 2, "none", False, torch.float32, True, {}):
        assert isinstance(message, str)
        assert "not the unsharded model (--verify-sharding)" in message
        assert "tolerance 1e-04" in message


def test_one_process_can_be_verified_too() -> None:
    model = small_model(torch.float32)
    shard_tensor_parallel(model)
    report = compare_with_unsharded(
        model, model, single_process(), random_tokens(length=12), dtype=torch.float32
    )
    assert report.agrees and report.worst.relative < FLOAT32_ROUNDING
    assert "largest relative error" in report.summary()


def test_padded_widths_are_verified_and_their_faults_seen() -> None:
    for changes in ({"attention_bias": True, "mlp_bias": True}, ALL_SWITCHES):
        model: Any = small_model(torch.float32, **changes)
        shard_tensor_parallel(model, pad_to=8)
        arguments = (model, model, single_process(), random_tokens(length=12))
        report = compare_with_unsharded(*arguments, dtype=torch.float32)
        assert report.agrees and report.worst.relative < FLOAT32_ROUNDING
        model.blocks[0].attn.scaling = 8**-0.5  # of the padded head
        with pytest.raises(SplitMismatchError):
            compare_with_unsharded(*arguments, dtype=torch.float32)


def test_documents_and_every_switch_are_verified() -> None:
    """Soft-capped logits, z-loss, windows and documents in the walk over the unsharded blocks."""
    model = small_model(torch.float32, **SWITCHES)
    shard_tensor_parallel(model)
    tokens, spans = random_tokens(length=21), random_spans(2, 20)
    report = compare_with_unsharded(
        model, model, single_process(), tokens, dtype=torch.float32, document_ids=ids_of(spans)
    )
    assert report.worst.relative < FLOAT32_ROUNDING
    expected, _ = alone(small_model(torch.float32, **SWITCHES), tokens, spans)
    assert report.unsharded_loss == pytest.approx(expected, rel=1e-5)


def test_relative_error_of_what_is_zero_in_theory() -> None:
    assert relative_error(1e-9, 1e-9, 1.0) == pytest.approx(1e-9)
    assert relative_error(1e-3, 1e-3, 1.0) == 1.0
    assert relative_error(0.0, 0.0, 0.0) == 0.0
    assert relative_error(1.0, 0.0, 0.0) == math.inf
    assert relative_error(math.nan, 1.0, 1.0) == math.inf
