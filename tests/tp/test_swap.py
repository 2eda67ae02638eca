"""Layers and head counts after the swap: local slices, shared heads, frozen parameters."""

import math
from typing import Any

import pytest
import torch

from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.verification.simulate import simulate
from tests.tp.unsharded import Grads, reference
from tp_shard import (
    SimulatedTPGroup,
    TensorParallelModel,
    gather_state_dict,
    shard_tensor_parallel,
)


def test_frozen_parameters_stay_frozen() -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = small_model()
        frozen = model.get_parameter("blocks.0.attn.k_proj.weight").requires_grad_(False)
        shard_tensor_parallel(model, SimulatedTPGroup.create(2)[0])
        split = model.get_parameter("blocks.0.attn.k_proj.weight")
        assert split is not frozen and not split.requires_grad
        assert model.get_parameter("blocks.0.attn.v_proj.weight").requires_grad


@pytest.mark.parametrize(
    ("heads", "key_value", "size"), [(6, 2, 6), pytest.param(24, 8, 24, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_more_ranks_than_key_value_heads(
    heads: int, key_value: int, size: int, sequence_parallel: bool
) -> None:
    """Each rank holds its group's head; gradients agree, and those of copies are equal to the bit."""
    changes: dict[str, Any] = {
        "num_attention_heads": heads, "num_key_value_heads": key_value, "attention_bias": True
    }  # fmt: skip
    tokens = random_tokens()
    loss, gradients, _ = reference(torch.float64, tokens, **changes)
    copies = [small_model(torch.float64, **changes) for _ in range(size)]

    def work(group: SimulatedTPGroup) -> tuple[float, Grads, Grads]:
        model = TensorParallelModel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        attention: Any = model.model.get_submodule("blocks.1.attn")
        assert (attention.num_heads, attention.num_kv_heads, attention.num_key_value_groups) == (1, 1, 1)
        own = loss_of(model, tokens)
        own.backward()
        model.sum_partial_gradients()
        local = {n: p.grad for n, p in model.model.named_parameters() if p.grad is not None}
        return float(own.detach()), gather_state_dict(model.model, gradients=True), local

    results = simulate(SimulatedTPGroup.create(size), work)
    sharers = size // key_value
    for rank, (sharded_loss, sharded, local) in enumerate(results):
        assert sharded_loss == pytest.approx(loss, rel=1e-12)
        for name, expected in gradients.items():
            assert relative_error(sharded[name], expected) < 1e-10, name
        owner = results[rank - rank % sharers][2]
        for name, grad in local.items():
            if "k_proj" in name or "v_proj" in name:
                assert torch.equal(grad, owner[name]), name


def test_head_counts_are_rewritten_and_slices_are_local() -> None:
    group = SimulatedTPGroup.create(4)[1]
    model = shard_tensor_parallel(small_model(), group)
    attention = model.get_submodule("blocks.0.attn")
    assert (attention.num_heads, attention.num_kv_heads, attention.num_key_value_groups) == (2, 1, 2)
    assert model.get_parameter("embed_tokens.weight").shape == (33, 50)
    assert model.get_parameter("blocks.0.mlp.down_proj.weight").shape == (50, 23)
    assert model.get_submodule("lm_head").weight is model.get_submodule("embed_tokens").weight


def test_reference_vocabulary_over_eight_ranks() -> None:
    with torch.device("meta"):
        model = small_model(vocab_size=151_665, num_key_value_heads=8)
    sharded = TensorParallelModel(model, SimulatedTPGroup.create(8)[7])
    slice_map = sharded.tensor_parallel.slice_map
    held = sum(box.size[0] for rank in range(8) for box in slice_map.owned("embed_tokens.weight", rank))
    assert held == 151_665
    rows = model.get_parameter("embed_tokens.weight").shape[0]
    assert rows * 8 <= 1.01 * 151_665 and rows >= math.ceil(151_665 / 8)
