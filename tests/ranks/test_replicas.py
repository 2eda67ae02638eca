"""Data parallelism over replicas leaves the mathematics alone."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from argonne.ranks.recompute import recompute_blocks
from argonne.ranks.replicas import (
    apply_ddp,
    apply_fsdp,
    forward_context,
    gradient_sync,
    local_gradients,
    local_parameters,
)
from argonne.testing.distributed import make_parallel, run_ranks
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.training.optimizer import GradientTotals
from tp_shard import TensorParallelState, shard_tensor_parallel

STEPS, BATCH = 2, 4


def train(
    model: Any,
    wrapped: Any,
    tokens: list[Tensor],
    context: Any,
    optimizer: torch.optim.Optimizer,
    dp: tuple[int, int],
) -> list[float]:
    """Steps of two micro-batches each; this replica takes its rows."""
    losses = []
    for step_tokens in tokens:
        optimizer.zero_grad()
        total = 0.0
        for micro, rows in enumerate(step_tokens.chunk(2)):
            own = rows.chunk(dp[1])[dp[0]]
            with gradient_sync(model, wrapped, last=micro == 1), context():
                loss = loss_of(wrapped, own) / 2
            loss.backward()
            total += loss.item()
        if hasattr(model, "tensor_parallel"):
            model.tensor_parallel.sum_partial_gradients(local_gradients(model))
        losses.append(total)
        optimizer.step()
    return losses


def step_tokens() -> list[Tensor]:
    return [random_tokens(batch=2 * BATCH, seed=step) for step in range(STEPS)]


def layout_rank(
    rank: int,
    world_size: int,
    tp_size: int,
    kind: str,
    sequence_parallel: bool,
    mode: str,
    dtype: torch.dtype,
    shape: dict[str, Any] | None = None,
) -> tuple[list[float], float, dict[str, list[tuple[Any, Tensor]]]]:
    """Mean loss over replicas, true gradient norm of the last step, and the owned weights of this rank."""
    nodes = {"local_world_size": world_size // 2} if kind == "hsdp" else {}
    layout = make_parallel(rank, world_size, tp_size, **nodes)
    model = small_model(torch.float32, attention_bias=True, **(shape or {}))
    shard_tensor_parallel(model, layout.mesh, sequence_parallel=sequence_parallel)
    recompute_blocks(model.blocks, mode)
    wrapped: Any = model
    if kind in ("fsdp", "hsdp", "kept"):
        apply_fsdp(model, model.blocks, layout, dtype, reshard_after_forward=kind != "kept")
    elif kind == "ddp":
        wrapped = apply_ddp(model, layout)
    sharded = kind in ("fsdp", "hsdp", "kept")
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    slice_map = state.slice_map.with_data_parallel(
        layout.dp_size, sharded=sharded, shard_size=layout.shard_size
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    context = forward_context(layout, dtype, sharded=sharded)
    losses = train(model, wrapped, step_tokens(), context, optimizer, (layout.dp_rank, layout.dp_size))
    totals = (
        GradientTotals(slice_map, rank, layout.world_group)
        .reduce(
            local_gradients(model), loss_share=torch.tensor(losses[-1] / world_size), votes=[float(rank == 1)]
        )
        .read()
    )
    assert totals.votes == (float(world_size > 1),)
    mean = torch.tensor(losses) / layout.dp_size / layout.tp_size
    dist.all_reduce(mean)
    assert totals.loss == pytest.approx(mean[-1].item(), rel=1e-6)
    weights = local_parameters(model)
    owned = {
        name: [
            (box.unsharded_index, weights[name][box.local_index].clone())
            for box in slice_map.owned(name, rank)
        ]
        for name in slice_map.names
    }
    assert all(tuple(weights[name].shape) == slice_map.local_shape(name, rank) for name in slice_map.names)
    return mean.tolist(), totals.grad_norm, owned


def one_process(
    dtype: torch.dtype = torch.float32, **shape: Any
) -> tuple[list[float], float, dict[str, Tensor]]:
    model = small_model(torch.float32, attention_bias=True, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    layout = make_parallel(0, 1, 1)
    context = forward_context(layout, dtype, sharded=False)
    losses = train(model, model, step_tokens(), context, optimizer, (0, 1))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    return losses, norm, {name: p.detach().clone() for name, p in model.named_parameters()}


LAYOUTS = [
    (4, 2, "fsdp", False, "none"),
    (4, 2, "fsdp", True, "selective"),
    (4, 2, "ddp", True, "full"),
    (2, 1, "fsdp", False, "full"),
    (4, 4, "none", False, "selective"),
    (4, 1, "hsdp", False, "none"),
    (4, 2, "kept", True, "none"),
    pytest.param(8, 2, "hsdp", True, "full", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "tp_size", "kind", "sequence_parallel", "mode"), LAYOUTS)
def test_layouts_train_like_one_process(
    world: int, tp_size: int, kind: str, sequence_parallel: bool, mode: str
) -> None:
    losses, norm, weights = one_process()
    results = run_ranks(layout_rank, world, tp_size, kind, sequence_parallel, mode, torch.float32)
    gathered = {name: torch.full_like(weight, float("nan")) for name, weight in weights.items()}
    for layout_losses, layout_norm, owned in results:
        assert layout_losses == pytest.approx(losses, rel=1e-5)
        assert layout_norm == pytest.approx(norm, rel=3e-4)
        for name, boxes in owned.items():
            for index, values in boxes:
                assert gathered[name][index].isnan().all(), f"{name} has two owners"
                gathered[name][index] = values
    for name, weight in weights.items():
        assert relative_error(gathered[name], weight) < 2e-3, name


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_bf16_layouts_stay_near_fp32(kind: str) -> None:
    losses, norm, _ = one_process()
    for layout_losses, layout_norm, _ in run_ranks(layout_rank, 4, 2, kind, False, "none", torch.bfloat16):
        assert layout_losses == pytest.approx(losses, rel=2e-2)
        assert layout_norm == pytest.approx(norm, rel=5e-2)
