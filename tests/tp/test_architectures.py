"""Llama, Mistral, Qwen2, Qwen3 and GPT-2 of transformers through the split, called as it calls them."""

import copy
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from argonne.errors import ConfigError
from argonne.ranks.recompute import recompute_blocks
from argonne.ranks.replicas import apply_fsdp, local_gradients
from argonne.ranks.world import World, build_parallel
from argonne.testing.distributed import run_ranks
from argonne.testing.models import random_tokens, relative_error
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.compare import difference
from argonne.verification.simulate import simulate
from tp_shard import TensorParallelState, gather_state_dict, gather_unsharded, shard_tensor_parallel

VOCAB = 131
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.15,  # attention far from uniform: its gradients are not lost in the others
}
"""131 ids and 90 features divide by nothing; 2 key/value heads are shared over 4 ranks."""


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model in float32; norms and biases are random too, so that each gradient counts."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**COMMON, sliding_window=4, head_dim=10))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=10, tie_word_embeddings=True))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=8, n_positions=64, bos_token_id=None,
                eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def _wide_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def widen(model: PreTrainedModel) -> PreTrainedModel:
    """In float64 throughout: transformers' norms round to float32."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_wide_norm, module)
    return model


def unsharded_loss(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Next-token loss by torch's own cross entropy, in the precision of the logits."""
    logits = model(input_ids=ids, use_cache=False, **options).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def check_gradients(gradients: dict[str, Tensor], reference: nn.Module, tolerance: float = 1e-10) -> None:
    """Each parameter's gradient by its own norm, or by the global one where it is zero in theory."""
    expected = gradients_of(reference)
    assert gradients.keys() == expected.keys()
    total = torch.cat([grad.double().flatten() for grad in expected.values()]).norm().item()
    for name, grad in expected.items():
        assert difference(name, gradients[name], grad, total).relative < tolerance, name


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


KINDS = ["llama", "mistral", "qwen2", "qwen3"]


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


def test_a_degree_that_heads_do_not_allow() -> None:
    with pytest.raises(ConfigError, match="use 1, 2, 4 or 8"):
        shard_tensor_parallel(build("llama"), SimulatedTPGroup.create(3)[0])


def test_an_architecture_without_a_plan() -> None:
    model = build("llama")
    setattr(model.config, "model_type", "unheard-of")  # noqa: B010
    with pytest.raises(ConfigError, match="no tensor-parallel plan for model type 'unheard-of'"):
        shard_tensor_parallel(model, SimulatedTPGroup.create(2)[0])


def test_sequence_parallelism_that_an_architecture_does_not_allow() -> None:
    """GPT-2 reshapes what its last norm returns by the length of the whole sequence."""
    with pytest.raises(ConfigError, match="--sequence-parallel does not work with GPT2LMHeadModel"):
        shard_tensor_parallel(build("gpt2"), SimulatedTPGroup.create(2)[0], sequence_parallel=True)


# ---------------------------------------------------------------------------------------------------
# With FSDP2, 16 bits and recomputation on a (2, 2) mesh


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
