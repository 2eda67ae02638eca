"""Llama, Mistral, Qwen2, Qwen3 and GPT-2 of transformers through the split, called as it calls them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from argonne.errors import ConfigError
from argonne.testing.distributed import run_ranks
from argonne.testing.models import random_tokens, relative_error
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import simulate
from tests.tp.hf_models import KINDS, VOCAB, build, check_gradients, gradients_of, unsharded_loss, widen
from tp_shard import gather_state_dict, shard_tensor_parallel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("sequence_parallel", "length"), [(False, 13), (True, 12), (True, 13), (True, 1 + 1), (True, 63)]
)
def test_every_gradient(kind: str, size: int, sequence_parallel: bool, length: int) -> None:
    ids = random_tokens(VOCAB, length=length)
    reference = widen(build(kind))
    loss = unsharded_loss(reference, ids)
    loss.backward()
    copies = [widen(build(kind)) for _ in range(size)]

    def work(group: SimulatedTPGroup) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        model: Any = shard_tensor_parallel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        group.counters.reset()
        own = model(input_ids=ids, labels=ids, use_cache=False).loss
        own.backward()
        calls = dict(group.counters.calls)
        model.tensor_parallel.sum_partial_gradients(gradients_of(model))
        return own.detach(), gather_state_dict(model, gradients=True), calls

    layers = 2
    for own, gradients, calls in simulate(SimulatedTPGroup.create(size), work):
        torch.testing.assert_close(own, loss.detach(), rtol=1e-12, atol=0)
        check_gradients(gradients, reference)
        if sequence_parallel:
            # The embedding's sum is whole; the head's entrance gathers its kept slice once more.
            assert calls == {"all_gather": 4 * layers + 3, "reduce_scatter": 4 * layers + 1, "all_reduce": 3}
        else:
            assert calls == {"all_reduce": 4 * layers + 2 + 2}


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_attention_masks_positions_and_ignored_labels(kind: str, sequence_parallel: bool) -> None:
    """A padded batch, as a fine-tuning script hands it over."""
    ids = random_tokens(VOCAB, length=11)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    reference = widen(build(kind))
    logits = reference(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    copies = [widen(build(kind)) for _ in range(4)]

    def work(group: SimulatedTPGroup) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        model: Any = shard_tensor_parallel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        own = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        own.backward()
        model.tensor_parallel.sum_partial_gradients(gradients_of(model))
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask, shift_labels=labels, use_cache=False).logits
        return own.detach(), gather_state_dict(model, gradients=True), whole

    for own, gradients, whole in simulate(SimulatedTPGroup.create(4), work):
        torch.testing.assert_close(own, loss.detach(), rtol=1e-12, atol=0)
        # Without labels there is no loss, and the logits are gathered whatever else is passed along.
        torch.testing.assert_close(whole, logits.detach(), rtol=1e-10, atol=1e-10)
        check_gradients(gradients, reference)


def test_norms_on_local_heads_have_partial_gradients() -> None:
    """Qwen3's q and k norms: a rank's own gradient is far from the whole before the sum."""
    ids = random_tokens(VOCAB, length=13)
    reference = widen(build("qwen3"))
    unsharded_loss(reference, ids).backward()
    copies = [widen(build("qwen3")) for _ in range(2)]

    def work(group: SimulatedTPGroup) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, int]]:
        model: Any = shard_tensor_parallel(copies[group.rank], group)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        partial = {name: grad.clone() for name, grad in gradients_of(model).items()}
        group.counters.reset()
        model.tensor_parallel.sum_partial_gradients(gradients_of(model))
        return partial, model.tensor_parallel.summed, dict(group.counters.calls)

    for partial, summed, calls in simulate(SimulatedTPGroup.create(2), work):
        assert summed == tuple(
            f"model.layers.{layer}.self_attn.{leaf}_norm.weight" for layer in range(2) for leaf in "qk"
        )
        assert calls == {"all_reduce": 1}, "one bucket"
        for name in summed:
            grad = reference.get_parameter(name).grad
            assert grad is not None and relative_error(partial[name], grad) > 0.1


@pytest.mark.parametrize("size", [2, 4])
def test_gpt2(size: int) -> None:
    """Fused query-key-value stored as (in_features, out_features), learned positions, biases everywhere."""
    ids = random_tokens(VOCAB, length=13)
    reference = build("gpt2").double()
    loss = unsharded_loss(reference, ids)
    loss.backward()
    copies = [build("gpt2").double() for _ in range(size)]

    def work(group: SimulatedTPGroup) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = shard_tensor_parallel(copies[group.rank], group)
        own = model(input_ids=ids, labels=ids, use_cache=False).loss
        own.backward()
        model.tensor_parallel.sum_partial_gradients(gradients_of(model))
        return own.detach(), gather_state_dict(model, gradients=True)

    for own, gradients in simulate(SimulatedTPGroup.create(size), work):
        torch.testing.assert_close(own, loss.detach(), rtol=1e-12, atol=0)
        check_gradients(gradients, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_generation(kind: str, sequence_parallel: bool) -> None:
    """One token at a time after an odd prompt, with transformers' own cache."""
    prompt = random_tokens(VOCAB, batch=1, length=5)
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    expected = build(kind).eval().generate(prompt, **options)
    copies = [build(kind).eval() for _ in range(2)]

    def work(group: SimulatedTPGroup) -> Tensor:
        model: Any = shard_tensor_parallel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        return model.generate(prompt, **options)

    for ids in simulate(SimulatedTPGroup.create(2), work):
        assert torch.equal(ids, expected)


def test_a_degree_that_heads_do_not_allow() -> None:
    with pytest.raises(ConfigError, match="use 1 to 8"):
        shard_tensor_parallel(build("llama"), SimulatedTPGroup.create(9)[0])


def test_an_architecture_without_a_plan() -> None:
    model = build("llama")
    setattr(model.config, "model_type", "unheard-of")  # noqa: B010
    with pytest.raises(ConfigError, match="no tensor-parallel plan for model type 'unheard-of'"):
        shard_tensor_parallel(model, SimulatedTPGroup.create(2)[0])


def test_sequence_parallelism_that_an_architecture_does_not_allow() -> None:
    """GPT-2 reshapes what its last norm returns by the length of the whole sequence."""
    with pytest.raises(ConfigError, match="--sequence-parallel does not work with GPT2LMHeadModel"):
        shard_tensor_parallel(build("gpt2"), SimulatedTPGroup.create(2)[0], sequence_parallel=True)


def test_copies_are_independent() -> None:
    """Sharding one model leaves a deep copy of it alone."""
    model = build("llama")
    other = copy.deepcopy(model)
    shard_tensor_parallel(model, SimulatedTPGroup.create(2)[0])
    ids = random_tokens(VOCAB, length=5)
    assert other(input_ids=ids).logits.shape == (2, 5, VOCAB)
    assert not hasattr(other, "tensor_parallel")


def mesh_by_name(rank: int, world_size: int) -> tuple[int, int]:
    """A mesh of one unnamed dimension is taken too."""
    mesh = init_device_mesh("cpu", (world_size,))
    model: Any = shard_tensor_parallel(build("qwen2"), mesh)
    return model.tensor_parallel.group.rank, model.tensor_parallel.group.size


def test_a_mesh_of_one_dimension() -> None:
    assert run_ranks(mesh_by_name, 2) == [(0, 2), (1, 2)]
