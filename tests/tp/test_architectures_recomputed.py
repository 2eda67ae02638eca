"""Transformers' models split, recomputed, in 16 bits and under FSDP2 on a (2, 2) mesh."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from argonne.ranks.recompute import recompute_blocks
from argonne.ranks.replicas import apply_fsdp, local_gradients
from argonne.ranks.world import World, build_parallel
from argonne.testing.distributed import run_ranks
from argonne.testing.models import random_tokens
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import simulate
from tests.tp.hf_models import VOCAB, build, check_gradients, gradients_of, unsharded_loss
from tp_shard import TensorParallelState, gather_unsharded, shard_tensor_parallel


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("how", ["transformers", "full", "selective"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_recomputed_layers_give_the_same_bits(kind: str, sequence_parallel: bool, how: str) -> None:
    """Also transformers' own checkpointing, which runs the layer's hooks again."""
    ids = random_tokens(VOCAB, length=13)
    copies = [[build(kind) for _ in range(2)] for _ in range(2)]

    def work(group: SimulatedTPGroup) -> list[dict[str, Tensor]]:
        results = []
        for mode, ranks in zip(("none", how), copies, strict=True):
            model: Any = shard_tensor_parallel(ranks[group.rank], group, sequence_parallel=sequence_parallel)
            if mode == "transformers":
                model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            else:
                recompute_blocks(model.model.layers, mode)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            results.append(gradients_of(model))
        return results

    for plain, recomputed in simulate(SimulatedTPGroup.create(2), work):
        assert plain.keys() == recomputed.keys()
        for name, grad in plain.items():
            assert torch.equal(grad, recomputed[name]), name


def mesh_rank(
    rank: int, world_size: int, kind: str, sequence_parallel: bool, mode: str, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    """Loss of this replica, and all gradients, whole."""
    world = World(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size,
        device=torch.device("cpu"), control_group=None, feed_group=None,
    )  # fmt: skip
    layout = build_parallel(world, 2)
    model: Any = shard_tensor_parallel(build(kind), layout.mesh, sequence_parallel=sequence_parallel)
    if mode == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        recompute_blocks(model.model.layers, mode)
    apply_fsdp(model, model.model.layers, layout, dtype)
    ids = random_tokens(VOCAB, batch=4, length=13).chunk(2)[layout.dp_rank]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    state: TensorParallelState = model.tensor_parallel
    state.sum_partial_gradients(local_gradients(model))
    gradients = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor) and parameter.dtype is torch.float32
        assert parameter.grad.dtype is torch.float32
        gradients[name] = gather_unsharded(parameter.grad.full_tensor(), name, state)
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("kind", "sequence_parallel", "mode", "dtype"),
    [
        ("qwen3", True, "full", torch.bfloat16),
        ("qwen3", True, "full", torch.float32),
        ("llama", False, "transformers", torch.bfloat16),
        pytest.param("llama", True, "selective", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("llama", True, "transformers", torch.float32, marks=pytest.mark.slow),
        pytest.param("mistral", True, "full", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("mistral", True, "transformers", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("qwen2", True, "full", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("qwen2", False, "none", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_with_fsdp_and_recomputation(
    kind: str, sequence_parallel: bool, mode: str, dtype: torch.dtype
) -> None:
    """The scenario in which PyTorch's PrepareModuleInput breaks: keyword arguments under checkpointing."""
    ids = random_tokens(VOCAB, batch=4, length=13)
    reference = build(kind)
    loss = unsharded_loss(reference, ids)
    loss.backward()
    results = run_ranks(mesh_rank, 4, kind, sequence_parallel, mode, dtype)
    exact = dtype is torch.float32
    mean = (results[0][0] + results[2][0]) / 2
    assert mean == pytest.approx(loss.item(), rel=1e-5 if exact else 1e-2)
    for _, gradients in results:
        check_gradients(gradients, reference, 1e-5 if exact else 0.1)
        assert all(torch.equal(grad, results[0][1][name]) for name, grad in gradients.items())
