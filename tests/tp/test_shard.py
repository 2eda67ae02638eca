"""The split model is the same model: outputs, loss, every gradient, ten AdamW steps, and its collectives."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from argonne.errors import ConfigError
from argonne.testing.distributed import run_ranks
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.verification.compare import difference
from argonne.verification.simulate import simulate
from tests.tp.unsharded import Grads, norm_of_all, reference
from tp_shard import (
    SimulatedTPGroup,
    TensorParallelModel,
    fitting_degrees,
    gather_state_dict,
    shard_tensor_parallel,
)


def sharded_rank(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    tokens: Tensor,
    sequence_parallel: bool,
    changes: dict[str, Any],
) -> tuple[float, Grads, Tensor, dict[str, int], dict[str, int], list[str]]:
    """One gloo rank: what `reference` gives, the collectives of loss and backward, and local replicas."""
    model = TensorParallelModel(
        small_model(dtype, **changes), dist.group.WORLD, sequence_parallel=sequence_parallel
    )
    counters = model.tensor_parallel.group.counters
    counters.reset()
    loss = loss_of(model, tokens)
    loss.backward()
    calls, payload = dict(counters.calls), dict(counters.bytes)
    model.sum_partial_gradients()
    gradients = gather_state_dict(model.model, gradients=True)
    replicas = [
        f"{name} {p.grad.double().sum().item():.17g}"
        for name, p in model.model.named_parameters()
        if model.tensor_parallel.slice_map.cut(name) is None and p.grad is not None
    ]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    return float(loss.detach()), gradients, logits, calls, payload, replicas


CASES = [
    (2, False, {}),
    (4, False, {"attention_bias": True, "mlp_bias": True}),
    (4, False, {"tie_word_embeddings": False}),
    (2, True, {"attention_bias": True, "mlp_bias": True}),
    (4, True, {"tie_word_embeddings": False}),
    # 4 key/value heads over 8 ranks: each head on two of them
    pytest.param(8, False, {}, marks=pytest.mark.slow),
    pytest.param(8, True, {"attention_bias": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "sequence_parallel", "changes"), CASES)
def test_every_gradient_agrees_over_gloo(size: int, sequence_parallel: bool, changes: dict[str, Any]) -> None:
    tokens = random_tokens()
    loss, gradients, logits = reference(torch.float64, tokens, **changes)
    results = run_ranks(sharded_rank, size, torch.float64, tokens, sequence_parallel, changes)
    for sharded_loss, sharded, sharded_logits, _, _, replicas in results:
        assert sharded_loss == pytest.approx(loss, rel=1e-12)
        assert sharded.keys() == gradients.keys()
        for name, expected in gradients.items():
            assert relative_error(sharded[name], expected) < 1e-10, name
        assert sharded_logits.shape == logits.shape
        assert relative_error(sharded_logits, logits) < 1e-12
        assert replicas == results[0][5], "replicated gradients differ between ranks"


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_are_those_of_the_design(size: int) -> None:
    tokens = random_tokens()
    batch, seq_len = tokens.shape[0], tokens.shape[1] - 1
    layers, hidden = 2, 50
    *_, calls, payload, _ = run_ranks(sharded_rank, size, torch.float32, tokens, False, {})[0]
    assert calls == {"all_reduce": 4 * layers + 2 + 2}
    loss_bytes = 3 * batch * seq_len * 4
    assert payload == {"all_reduce": (4 * layers + 2) * batch * seq_len * hidden * 4 + loss_bytes}


def test_collectives_under_sequence_parallelism() -> None:
    tokens = random_tokens(length=17)
    layers, size, activation = 2, 2, 2 * 16 * 50 * 4
    *_, calls, payload, _ = run_ranks(sharded_rank, size, torch.float32, tokens, True, {})[0]
    regathers = 2 * layers + 1
    assert calls == {
        "all_gather": 4 * layers + 2 + regathers,
        "reduce_scatter": 4 * layers + 2,
        "all_reduce": 2,
    }
    assert payload["reduce_scatter"] == (4 * layers + 2) * activation
    assert payload["all_gather"] == (4 * layers + 2 + regathers) * activation


def trained_rank(rank: int, world_size: int, sequence_parallel: bool, steps: int) -> dict[str, Tensor]:
    model = shard_tensor_parallel(small_model(torch.float32), sequence_parallel=sequence_parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, random_tokens(seed=step)).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.tensor_parallel.sum_partial_gradients(gradients)  # type: ignore[operator, union-attr]
        optimizer.step()
    return gather_state_dict(model)


@pytest.mark.parametrize(("size", "sequence_parallel"), [(4, False), (2, True)])
def test_weights_after_ten_adamw_steps(size: int, sequence_parallel: bool) -> None:
    model = small_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(model, random_tokens(seed=step)).backward()
        optimizer.step()
    results = run_ranks(trained_rank, size, sequence_parallel, 10)
    for name, parameter in model.named_parameters():
        assert relative_error(results[0][name], parameter.detach()) < 2e-3, name
        for other in results[1:]:
            assert torch.equal(other[name], results[0][name])


def run_simulated(
    size: int, dtype: torch.dtype, tokens: Tensor, sequence_parallel: bool, **changes: Any
) -> list[tuple[float, Grads]]:
    """The same check with threads of one process in place of ranks."""
    copies = [small_model(dtype, **changes) for _ in range(size)]

    def work(group: SimulatedTPGroup) -> tuple[float, Grads]:
        model = TensorParallelModel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        loss = loss_of(model, tokens)
        loss.backward()
        model.sum_partial_gradients()
        return float(loss.detach()), gather_state_dict(model.model, gradients=True)

    return simulate(SimulatedTPGroup.create(size), work)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("length", "sequence_parallel"), [(14, False), (2, True), (14, True), (424, True)])
def test_simulated_ranks_agree(size: int, length: int, sequence_parallel: bool) -> None:
    tokens = random_tokens(length=length)
    loss, gradients, _ = reference(torch.float64, tokens)
    total = norm_of_all(gradients)
    for sharded_loss, sharded in run_simulated(size, torch.float64, tokens, sequence_parallel):
        assert sharded_loss == pytest.approx(loss, rel=1e-12)
        for name, expected in gradients.items():
            # One position attends to itself alone: the gradients of query and key are zero but for rounding.
            assert difference(name, sharded[name], expected, total).relative < 1e-10, name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_autocast_stays_near_fp32(sequence_parallel: bool) -> None:
    """bf16 at one replica; the residual stream crosses the ranks in 16 bits, the loss in float32."""
    tokens = random_tokens()
    loss, gradients, _ = reference(torch.float32, tokens)
    copies = [small_model(torch.float32) for _ in range(2)]

    def work(group: SimulatedTPGroup) -> tuple[float, Grads, dict[str, int]]:
        model = TensorParallelModel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        group.counters.reset()
        with torch.autocast("cpu", torch.bfloat16):
            own = loss_of(model, tokens)
        own.backward()
        payload = dict(group.counters.bytes)
        model.sum_partial_gradients()
        assert own.dtype is torch.float32
        return float(own.detach()), gather_state_dict(model.model, gradients=True), payload

    batch, layers = tokens.shape[0], 2
    each_way = 2 * layers + 1
    for sharded_loss, sharded, payload in simulate(SimulatedTPGroup.create(2), work):
        assert sharded_loss == pytest.approx(loss, rel=1e-2)
        assert all(grad.dtype is torch.float32 for grad in sharded.values())
        assert all(relative_error(sharded[name], grad) < 0.05 for name, grad in gradients.items())
        if sequence_parallel:
            activation = batch * 14 * 50 * 2  # 13 positions, padded
            assert payload["reduce_scatter"] == 2 * each_way * activation
            assert payload["all_gather"] == 3 * each_way * activation
        else:
            assert payload["all_reduce"] == 2 * each_way * batch * 13 * 50 * 2 + 3 * 4 * batch * 13


def random_case(generator: random.Random) -> tuple[int, bool, dict[str, Any], Tensor]:
    """A degree, sequence parallelism or not, a shape that allows the degree, and a batch."""
    key_value = generator.choice([1, 2, 3, 4])
    query = key_value * generator.choice([1, 2, 3])
    size = generator.choice([degree for degree in fitting_degrees(query) if degree > 1] or [1])
    vocab = generator.randint(2, 70)
    changes = {
        "vocab_size": vocab,
        "hidden_size": generator.randint(4, 40),
        "num_hidden_layers": generator.choice([1, 2]),
        "num_attention_heads": query,
        "num_key_value_heads": key_value,
        "head_dim": 2 * generator.randint(1, 5),
        "intermediate_size": generator.randint(1, 50),
        "attention_bias": generator.random() < 0.5,
        "mlp_bias": generator.random() < 0.5,
        "tie_word_embeddings": generator.random() < 0.5,
        "attn_implementation": generator.choice(["sdpa", "eager"]),
    }
    tokens = random_tokens(
        vocab, generator.randint(1, 3), generator.randint(3, 20), seed=generator.randrange(1 << 30)
    )
    return size, generator.random() < 0.5, changes, tokens


@pytest.mark.parametrize(
    ("seed", "rounds"), [(3, 8), pytest.param(None, 150, marks=(pytest.mark.slow, pytest.mark.timeout(900)))]
)
def test_random_shapes(seed: int | None, rounds: int) -> None:
    """Any shape, degree and length: loss and every gradient."""
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    generator = random.Random(seed)
    for _ in range(rounds):
        size, sequence_parallel, changes, tokens = random_case(generator)
        print(size, sequence_parallel, changes, tuple(tokens.shape))
        loss, gradients, _ = reference(torch.float64, tokens, **changes)
        total = norm_of_all(gradients)
        results = run_simulated(size, torch.float64, tokens, sequence_parallel, **changes)
        for sharded_loss, sharded in results:
            assert sharded_loss == pytest.approx(loss, rel=1e-12)
            for name, grad in gradients.items():
                assert difference(name, sharded[name], grad, total).relative < 1e-9, name


def missing_backward_rank(rank: int, world_size: int) -> float:
    """A split whose entrance forgets its backward reduction: the loss agrees, the gradients must not."""
    model = TensorParallelModel(small_model(torch.float64))
    group: Any = model.tensor_parallel.group
    tokens = random_tokens()
    loss = loss_of(model, tokens)
    group.start_all_reduce = lambda tensor, op="sum", owned=False: tensor
    group.wait = lambda tensor: tensor
    loss.backward()
    name = "blocks.0.input_norm.weight"
    gradient = model.model.get_parameter(name).grad
    assert gradient is not None
    return relative_error(gradient, reference(torch.float64, tokens)[1][name])


def test_the_comparison_sees_a_missing_backward_reduction() -> None:
    assert run_ranks(missing_backward_rank, 2)[0] > 0.1


def generate_rank(rank: int, world_size: int, sequence_parallel: bool) -> Tensor:
    model = TensorParallelModel(small_model(torch.float32), sequence_parallel=sequence_parallel).eval()
    ids = random_tokens(batch=1, length=5)
    return model.generate(ids, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_generation_equals_the_unsharded_models(sequence_parallel: bool) -> None:
    expected = small_model(torch.float32).eval().generate(
        random_tokens(batch=1, length=5), max_new_tokens=8, do_sample=False
    )  # fmt: skip
    for ids in run_ranks(generate_rank, 2, sequence_parallel):
        assert torch.equal(ids, expected)


@pytest.mark.parametrize(
    ("heads", "key_value", "size", "listed"), [(24, 8, 25, "1 to 24"), (8, 8, 9, "1 to 8")]
)
def test_a_degree_that_cannot_work_names_those_that_can(
    heads: int, key_value: int, size: int, listed: str
) -> None:
    changes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": key_value, "head_dim": 2}
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size {size} .*use {listed}"):
        shard_tensor_parallel(small_model(**changes), SimulatedTPGroup.create(size)[0])


@pytest.mark.parametrize("tie", [True, False])
def test_the_wrapper_gives_the_whole_weights_on_every_rank(tie: bool) -> None:
    expected = small_model(tie_word_embeddings=tie).state_dict()
    copies = [small_model(tie_word_embeddings=tie) for _ in range(4)]

    def work(group: SimulatedTPGroup) -> Grads:
        return TensorParallelModel(copies[group.rank], group).unsharded_state_dict()

    for whole in simulate(SimulatedTPGroup.create(4), work):
        small_model(tie_word_embeddings=tie, seed=1).load_state_dict(whole, strict=True)
        for name, weight in expected.items():
            assert torch.equal(whole[name], weight), name
