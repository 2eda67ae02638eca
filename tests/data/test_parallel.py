"""Replicas beside the split: what crosses them, when and in which precision; copies stay copies."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

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
from argonne.tp.group import SimulatedTPGroup
from argonne.tp.initial_values import initialise_parameters
from argonne.training.optimizer import DeviceTotals, GradientTotals, build_adamw, scale_gradients
from argonne.verification.simulate import simulate
from tp_shard import SliceMap, TensorParallelModel, shard_tensor_parallel

CLIP = 0.5


class Reductions(TorchDispatchMode):
    """Element types of the tensors that are reduced over replicas, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__:
            tensors = args[1] if "scatter" in func.__name__ else args[0]
            self.dtypes.append((tensors if isinstance(tensors, Tensor) else tensors[0]).dtype)
        return func(*args, **(kwargs or {}))


def accumulating_rank(
    rank: int, world_size: int, kind: str, dtype: torch.dtype, micro_steps: int
) -> tuple[list[torch.dtype], dict[str, Tensor], list[torch.dtype]]:
    """Of one accumulated step: what the reductions carry, gradients, dtypes of the rotary tables."""
    layout = make_parallel(rank, world_size, 1)
    assert layout.mesh is not None
    model: Any = shard_tensor_parallel(small_model(torch.float32), layout.mesh)
    wrapped = model
    if kind == "fsdp":
        apply_fsdp(model, model.blocks, layout, dtype)
    else:
        wrapped = apply_ddp(model, layout)
    tables: list[torch.dtype] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: tables.append(args[1][0].dtype))
    context = forward_context(layout, dtype, sharded=kind == "fsdp")
    tokens = random_tokens(batch=2 * micro_steps * world_size)
    with Reductions() as reductions:
        for micro_step, rows in enumerate(tokens.chunk(micro_steps)):
            with gradient_sync(model, wrapped, last=micro_step == micro_steps - 1):
                with context():
                    loss = loss_of(wrapped, rows.chunk(world_size)[rank]) / micro_steps
                loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return reductions.dtypes, gradients, tables


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_reduce_once_a_step_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Whatever the accumulation; and the rotary tables are never rounded."""
    reductions = {}
    for micro_steps in (1, 3):
        results = run_ranks(accumulating_rank, 2, kind, dtype, micro_steps)
        reference = small_model(torch.float32)
        tokens = random_tokens(batch=4 * micro_steps)
        loss_of(reference, tokens).backward()
        for dtypes, gradients, tables in results:
            reductions[micro_steps] = len(dtypes)
            assert set(dtypes) == {torch.float32}
            assert set(tables) == {torch.float32}
            for name, parameter in reference.named_parameters():
                assert parameter.grad is not None
                limit = 1e-5 if dtype is torch.float32 else 0.1
                assert relative_error(gradients[name], parameter.grad) < limit, name
    assert reductions[1] == reductions[3] > 0
    if kind == "fsdp":
        assert reductions[1] == 2 + 1, "one for each block, one for embedding, head and norm"


# ---------------------------------------------------------------------------------------------------
# Copies stay copies


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [4, 8])
def test_copies_stay_equal_to_the_bit(size: int, sequence_parallel: bool) -> None:
    """Norms, row biases, and heads that ranks share (4 over 8), after ten clipped steps of AdamW."""
    changes: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    unsharded = small_model(torch.float64, **changes)
    optimizer = torch.optim.AdamW(unsharded.parameters(), lr=1e-3)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(unsharded, random_tokens(seed=step)).backward()
        torch.nn.utils.clip_grad_norm_(unsharded.parameters(), CLIP)
        optimizer.step()
    models = [small_model(torch.float64, **changes) for _ in range(size)]

    def work(group: SimulatedTPGroup) -> tuple[dict[str, Tensor], SliceMap, list[float]]:
        model = TensorParallelModel(models[group.rank], group, sequence_parallel=sequence_parallel)
        slice_map = model.tensor_parallel.slice_map
        totals = GradientTotals(slice_map, group.rank, None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        norms = []
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, random_tokens(seed=step)).backward()
            model.sum_partial_gradients()
            gradients = local_gradients(model.model)
            own = totals.reduce(gradients, loss_share=torch.zeros(())).read()
            norms.append(math.sqrt(group.all_reduce(torch.tensor(own.grad_norm**2)).item()))
            sums = torch.tensor([norms[-1] ** 2, 0.0], dtype=torch.float64)
            scale_gradients(gradients, DeviceTotals(sums, counts=(0, 0), scale=1.0).factor(CLIP))
            optimizer.step()
        return local_parameters(model.model), slice_map, norms

    results = simulate(SimulatedTPGroup.create(size), work)
    slice_map = results[0][1]
    assert all(norms == results[0][2] and min(norms) > CLIP for _, _, norms in results)
    copied = 0
    for name, parameter in unsharded.named_parameters():
        whole = torch.full_like(parameter.detach(), math.nan)
        for rank, (weights, _, _) in enumerate(results):
            for box in slice_map.owned(name, rank):
                whole[box.unsharded_index] = weights[name][box.local_index]
        for rank, (weights, _, _) in enumerate(results):
            padding = torch.ones_like(weights[name], dtype=torch.bool)
            for box in slice_map.rectangles(name, rank):
                copied += not box.owned
                assert torch.equal(weights[name][box.local_index], whole[box.unsharded_index]), name
                padding[box.local_index] = False
            assert torch.count_nonzero(weights[name][padding]) == 0, f"{name}: padding was trained"
        # AdamW divides a gradient by its own size, and makes much of the rounding of the smallest.
        assert relative_error(whole, parameter.detach()) < 1e-7, name
    # 5 norms, row biases of 2 layers; with 8 ranks half of them hold copies of k and v, weight and bias
    assert copied == (5 + 4) * (size - 1) + (8 * 4 if size == 8 else 0)


def test_initial_values_do_not_depend_on_the_layout() -> None:
    """Slices of every layout are those of the one unsharded draw; drawn by nobody twice alike."""
    model = small_model(torch.float32, attention_bias=True)
    whole: dict[str, Tensor] = {}
    for tp_size, dp_size, sharded in ((1, 1, False), (2, 1, False), (8, 1, False), (4, 3, True)):
        with torch.device("meta"):
            split: Any = small_model(torch.float32, attention_bias=True)
        shard_tensor_parallel(split, SimulatedTPGroup.create(tp_size)[0])
        slice_map = split.tensor_parallel.slice_map.with_data_parallel(dp_size, sharded=sharded)
        for rank in range(tp_size * dp_size):
            local = {n: torch.full(slice_map.local_shape(n, rank), math.nan) for n in slice_map.names}
            initialise_parameters(local, slice_map, rank, lambda n: None if "norm" in n else 0.5, 7)
            for name, tensor in local.items():
                assert not tensor.isnan().any()
                if tp_size == 1:
                    whole[name] = tensor
                for box in slice_map.rectangles(name, rank):
                    assert torch.equal(tensor[box.local_index], whole[name][box.unsharded_index]), name
    drawn = [whole[name] for name, p in model.named_parameters() if p.dim() == 2]
    assert all(0.4 < tensor.std() < 0.6 and abs(tensor.mean()) < 0.05 for tensor in drawn)
    assert not torch.equal(whole["blocks.0.attn.q_proj.weight"], whole["blocks.1.attn.q_proj.weight"])


# ---------------------------------------------------------------------------------------------------
# Eight processes train like one


def curve_rank(
    rank: int, world_size: int, tp_size: int, kind: str, sequence_parallel: bool, mode: str, steps: int
) -> tuple[list[float], list[float], dict[str, list[tuple[Any, Tensor]]]]:
    """Mean loss and gradient norm of each step, two micro-batches a step; this rank's owned weights."""
    layout = make_parallel(rank, world_size, tp_size)
    model: Any = small_model(torch.float32, attention_bias=True)
    shard_tensor_parallel(model, layout.mesh, sequence_parallel=sequence_parallel)
    recompute_blocks(model.blocks, mode)
    wrapped = model
    if kind == "fsdp":
        apply_fsdp(model, model.blocks, layout, torch.float32)
    elif layout.dp_size > 1:
        wrapped = apply_ddp(model, layout)
    slice_map = model.tensor_parallel.slice_map.with_data_parallel(layout.dp_size, sharded=kind == "fsdp")
    totals = GradientTotals(slice_map, rank, layout.world_group)
    optimizer = build_adamw(
        dict(model.named_parameters()), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, device=layout.device
    )
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        share = torch.zeros(())
        for micro_step, rows in enumerate(random_tokens(batch=16, seed=step).chunk(2)):
            with gradient_sync(model, wrapped, last=micro_step == 1):
                loss = loss_of(wrapped, rows.chunk(layout.dp_size)[layout.dp_rank]) / 2
                loss.backward()
            share += loss.detach() / world_size
        gradients = local_gradients(model)
        model.tensor_parallel.sum_partial_gradients(gradients)
        with Reductions() as reductions:
            on_device = totals.reduce(gradients, loss_share=share)
        assert len(reductions.dtypes) == 1, "norm, loss and stop travel together"
        scale_gradients(gradients, on_device.factor(CLIP))
        optimizer.step()
        result = on_device.read()
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = local_parameters(model)
    owned = {
        name: [(box.unsharded_index, weights[name][box.local_index].clone()) for box in boxes]
        for name in slice_map.names
        if (boxes := slice_map.owned(name, rank))
    }
    return losses, norms, owned


@pytest.mark.parametrize(
    ("world", "tp_size", "kind", "sequence_parallel", "mode"),
    [
        (4, 2, "fsdp", True, "selective"),
        pytest.param(8, 2, "fsdp", True, "full", marks=pytest.mark.slow),
        pytest.param(8, 4, "fsdp", False, "none", marks=pytest.mark.slow),
        pytest.param(8, 4, "ddp", True, "selective", marks=pytest.mark.slow),
        pytest.param(8, 2, "ddp", False, "none", marks=pytest.mark.slow),
        pytest.param(8, 8, "none", True, "none", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_loss_curve_equals_one_process(
    world: int, tp_size: int, kind: str, sequence_parallel: bool, mode: str
) -> None:
    """Ten clipped steps: losses, norms and weights by the limits of agreement."""
    unsharded = small_model(torch.float32, attention_bias=True)
    optimizer = torch.optim.AdamW(unsharded.parameters(), lr=1e-3, weight_decay=0.1)
    expected = []
    for step in range(10):
        optimizer.zero_grad()
        loss = loss_of(unsharded, random_tokens(batch=16, seed=step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(unsharded.parameters(), CLIP)
        optimizer.step()
        expected.append((loss.item(), norm.item()))
    assert min(norm for _, norm in expected) > CLIP
    results = run_ranks(curve_rank, world, tp_size, kind, sequence_parallel, mode, 10, timeout=800)
    gathered = {name: torch.full_like(p.detach(), math.nan) for name, p in unsharded.named_parameters()}
    for losses, norms, owned in results:
        assert (losses, norms) == results[0][:2], "all ranks see the same"
        assert losses[0] == pytest.approx(expected[0][0], rel=1e-5)
        assert losses == pytest.approx([loss for loss, _ in expected], rel=3e-5)
        assert norms == pytest.approx([norm for _, norm in expected], rel=3e-4)
        for name, boxes in owned.items():
            for index, values in boxes:
                gathered[name][index] = values
    for name, parameter in unsharded.named_parameters():
        assert relative_error(gathered[name], parameter.detach()) < 2e-3, name
