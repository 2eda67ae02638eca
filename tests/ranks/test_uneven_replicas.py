"""Uneven degrees on real ranks: replicas, recomputation, compilation, copies that stay equal."""

import math
from typing import Any

import pytest
import torch

from argonne.errors import PeerError
from argonne.ranks.recompute import compile_blocks
from argonne.ranks.replicas import apply_fsdp, local_gradients, local_parameters
from argonne.testing.distributed import run_ranks
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.verification.replicas import check_replicas
from tests.model.family_reference import SWITCHES, loss_and_gradients
from tests.ranks.test_replicas import layout_rank, one_process
from tests.ranks.test_replicas import test_layouts_train_like_one_process as check_layout
from tests.verification.layouts import layout
from tp_shard import TensorParallelState, gather_state_dict, shard_tensor_parallel

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "tp_size", "kind", "sequence_parallel", "mode"),
    [
        (3, 3, "none", True, "full"),
        (6, 3, "fsdp", False, "none"),
        (6, 3, "fsdp", True, "selective"),
        (6, 3, "ddp", True, "full"),
        (5, 5, "none", True, "selective"),
    ],
)
def test_uneven_layouts_train_like_one_process(
    world: int, tp_size: int, kind: str, sequence_parallel: bool, mode: str
) -> None:
    check_layout(world, tp_size, kind, sequence_parallel, mode)


def test_copied_heads_of_a_node_are_summed_there() -> None:
    """hsdp, two nodes of two replicas: ranks 0 and 1 of each replica hold the second of three heads."""
    shape: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3}
    losses, norm, _ = one_process(torch.float32, **shape)
    results = run_ranks(layout_rank, 8, 2, "hsdp", False, "none", torch.float32, shape, timeout=600)
    for layout_losses, layout_norm, _ in results:
        assert layout_losses == pytest.approx(losses, rel=1e-5)
        assert layout_norm == pytest.approx(norm, rel=3e-4)


def copies_rank(rank: int, world_size: int, kind: str, culprit: int) -> tuple[str, str]:
    """What is found while all is well, and after one element of a copied head changes on one rank."""
    parallel = layout(rank, world_size, 3)
    model = small_model(torch.float32, attention_bias=True)
    shard_tensor_parallel(model, parallel.mesh)
    if kind == "fsdp":
        apply_fsdp(model, model.blocks, parallel, torch.float32)
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    slice_map = state.slice_map.with_data_parallel(parallel.dp_size, sharded=kind == "fsdp")
    weights, found = local_parameters(model), []
    for name in ("", "blocks.1.attn.v_proj.weight"):
        held = [part for part in slice_map.copies(name) if culprit in part] if name else []
        if held and rank == culprit:
            view = weights[name][held[-1][rank].local_index]
            view[0, 0] = torch.nextafter(view[0, 0], torch.tensor(math.inf))
        try:
            check_replicas(weights, slice_map, parallel)
            found.append("")
        except PeerError as error:
            found.append(str(error))
    return found[0], found[1]


@pytest.mark.parametrize(("world", "kind", "culprit"), [(3, "none", 1), (6, "fsdp", 2)])
def test_a_changed_copy_of_one_head_is_named(world: int, kind: str, culprit: int) -> None:
    for well, changed in run_ranks(copies_rank, world, kind, culprit):
        assert well == ""
        assert changed.startswith("blocks.1.attn.v_proj.weight is no longer the same on all ranks")
        assert "1 of 2 copies" in changed


def compiled_rank(rank: int, world_size: int) -> tuple[float, dict[str, torch.Tensor], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = shard_tensor_parallel(small_model(torch.float32, **SWITCHES), sequence_parallel=True)
    compile_blocks(model.blocks)  # type: ignore[arg-type]
    loss = loss_of(model, random_tokens())
    loss.backward()
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    state.sum_partial_gradients(local_gradients(model))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return loss.item(), gather_state_dict(model, gradients=True), breaks


def test_compiled_blocks_of_an_uneven_degree() -> None:
    expected, gradients = loss_and_gradients(small_model(torch.float32, **SWITCHES), random_tokens())
    for loss, actual, breaks in run_ranks(compiled_rank, 3, timeout=500):
        assert breaks == 0
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients.items():
            assert relative_error(actual[name], gradient) < 1e-5, name
