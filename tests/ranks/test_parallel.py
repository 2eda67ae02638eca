"""Recomputation, data parallelism and compilation leave the mathematics alone."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import argonne.ranks.world as parallel_module
from argonne.errors import ConfigError, DeviceError
from argonne.ranks.recompute import compile_blocks, recompute_blocks
from argonne.ranks.replicas import (
    apply_ddp,
    apply_fsdp,
    forward_context,
    gradient_sync,
    local_gradients,
    local_parameters,
)
from argonne.ranks.world import Environment, choose_device, default_tp_size, resolve_tp_size
from argonne.testing.distributed import make_parallel, run_ranks
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.training.optimizer import GradientTotals
from tp_shard import shard_tensor_parallel

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
) -> tuple[list[float], float, dict[str, list[tuple[Any, Tensor]]]]:
    """Mean loss over replicas, true gradient norm of the last step, and the owned weights of this rank."""
    layout = make_parallel(rank, world_size, tp_size)
    model = small_model(torch.float32, attention_bias=True)
    shard_tensor_parallel(model, layout.mesh, sequence_parallel=sequence_parallel)
    recompute_blocks(model.blocks, mode)
    wrapped: Any = model
    if kind == "fsdp":
        apply_fsdp(model, model.blocks, layout, dtype)
    elif kind == "ddp":
        wrapped = apply_ddp(model, layout)
    sharded = kind == "fsdp"
    slice_map = model.tensor_parallel.slice_map.with_data_parallel(layout.dp_size, sharded=sharded)  # type: ignore[union-attr, operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    context = forward_context(layout, dtype, sharded=sharded)
    losses = train(model, wrapped, step_tokens(), context, optimizer, (layout.dp_rank, layout.dp_size))
    totals = GradientTotals(slice_map, rank, layout.world_group).reduce(
        local_gradients(model), loss_share=torch.tensor(losses[-1] / world_size), stop=rank == 1, scale=1.0
    )
    assert totals.stop == (world_size > 1)
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


def one_process(dtype: torch.dtype = torch.float32) -> tuple[list[float], float, dict[str, Tensor]]:
    model = small_model(torch.float32, attention_bias=True)
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


def recompute_rank(
    rank: int, world_size: int, mode: str, sequence_parallel: bool
) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the collectives the process group really carried (a replayed call may be answered
    from what was kept, so the group object's own counter does not tell)."""
    group = dist.new_group(backend="gloo")
    model = shard_tensor_parallel(small_model(torch.float32), group, sequence_parallel=sequence_parallel)
    recompute_blocks(model.blocks, mode)  # type: ignore[arg-type]
    before = group._get_sequence_number_for_group()
    loss_of(model, random_tokens()).backward()
    calls = group._get_sequence_number_for_group() - before
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recomputation_gives_the_same_bits(sequence_parallel: bool) -> None:
    plain, calls = run_ranks(recompute_rank, 2, "none", sequence_parallel)[0]
    layers = 2
    expected = {"selective": calls, "full": calls + layers * (3 if sequence_parallel else 1)}
    for mode, expected_calls in expected.items():
        again, mode_calls = run_ranks(recompute_rank, 2, mode, sequence_parallel)[0]
        assert all(torch.equal(again[name], gradient) for name, gradient in plain.items()), mode
        # full: the attention's exit is replayed (and with sequence parallelism both entrances); the last
        # exit, whose result nothing in the backward pass needs, is not.
        assert mode_calls == expected_calls


def test_default_degree_is_the_largest_that_fits_a_node() -> None:
    assert default_tp_size(8, 24, 8) == 8
    assert default_tp_size(6, 24, 8) == 2
    assert default_tp_size(3, 24, 8) == 1
    assert default_tp_size(6, 6, 2) == 6


def test_degree_that_does_not_divide_the_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 6 processes started; use 1 or 2"):
        resolve_tp_size(4, world_size=6, local_world_size=6, query_heads=8, key_value_heads=4)


def test_environment_defaults_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Environment.read() == parallel_module.Environment(
        rank=0, world_size=1, local_rank=0, local_world_size=1, master="localhost:29500", run_id=None
    )


def compiled_rank(rank: int, world_size: int, mode: str, sequence_parallel: bool) -> tuple[float, int, int]:
    """Largest relative difference to eager, graph breaks, and graphs compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    gradients = []
    for compiled in (False, True):
        model = shard_tensor_parallel(small_model(torch.float32), sequence_parallel=sequence_parallel)
        recompute_blocks(model.blocks, mode)  # type: ignore[arg-type]
        if compiled:
            compile_blocks(model.blocks)  # type: ignore[arg-type]
        loss_of(model, random_tokens()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, fast = gradients
    worst = max(relative_error(fast[name], gradient) for name, gradient in eager.items())
    return worst, sum(counters["graph_break"].values()), counters["frames"]["ok"]


@pytest.mark.parametrize(
    ("mode", "sequence_parallel"),
    [
        ("none", True),
        pytest.param("none", False, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
        pytest.param("selective", False, marks=pytest.mark.slow),
        pytest.param("selective", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_have_no_graph_break(mode: str, sequence_parallel: bool) -> None:
    for worst, breaks, graphs in run_ranks(compiled_rank, 2, mode, sequence_parallel):
        assert worst < 1e-5
        assert breaks == 0
        assert graphs >= 1


def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One visible GPU each is taken whatever the local rank; too few GPUs are named."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, {"RANK": "3"}.get(name, "4"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    environment = Environment.read()
    for count, index in ((8, 3), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert choose_device(environment) == torch.device("cuda", index)
    assert taken == [3, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"local rank 3 has no GPU: 2 are visible"):
        choose_device(environment)
