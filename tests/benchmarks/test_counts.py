"""What a step costs, counted exactly: collectives, their bytes, what autograd keeps, parameters on a rank."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from argonne.config.presets import PRESETS
from argonne.testing.models import loss_of, random_tokens, small_model
from argonne.tp.architectures import ARGONNE_PLAN
from argonne.tp.group import SimulatedTPGroup
from argonne.tp.plan import build_slice_map
from argonne.verification.simulate import simulate
from model import ArgonneConfig, ArgonneModel
from tests.benchmarks.saved_activations import saved_bytes
from tp_shard import shard_tensor_parallel

Traffic = dict[str, tuple[int, int]]

# ---------------------------------------------------------------------------------------------------
# Collectives


def traffic(
    size: int, layers: int, length: int, dtype: torch.dtype, *, sequence_parallel: bool, **changes: Any
) -> list[tuple[Traffic, Traffic, Traffic, Traffic]]:
    """Per rank: forward with loss, backward, completing the gradients, and that over shared heads."""
    models = [small_model(dtype, num_hidden_layers=layers, **changes) for _ in range(size)]
    tokens = random_tokens(length=length + 1)

    def work(group: SimulatedTPGroup) -> tuple[Traffic, Traffic, Traffic, Traffic]:
        model: Any = shard_tensor_parallel(models[group.rank], group, sequence_parallel=sequence_parallel)
        counters = group.counters
        counters.reset()
        loss = loss_of(model, tokens)
        forward = counters.totals()
        counters.reset()
        loss.backward()
        backward = counters.totals()
        counters.reset()
        state = model.tensor_parallel
        state.sum_partial_gradients({name: p.grad for name, p in model.named_parameters()})
        shared = {} if state.sharers is None else state.sharers.counters.totals()
        return forward, backward, counters.totals(), shared

    return simulate(SimulatedTPGroup.create(size), work)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collectives(size: int, layers: int, dtype: torch.dtype) -> None:
    """4 L + 2 all-reduces of the residual stream, in its own dtype, and 2 for the loss; no more a step."""
    batch, length, hidden = 2, 13, 50
    activation = batch * length * hidden * dtype.itemsize
    each_way = 2 * layers + 1
    for forward, backward, completed, shared in traffic(size, layers, length, dtype, sequence_parallel=False):
        assert forward == {"all_reduce": (each_way + 2, each_way * activation + 3 * 4 * batch * length)}
        assert backward == {"all_reduce": (each_way, each_way * activation)}
        assert completed == shared == {}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("length", [8, 13, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collectives_under_sequence_parallelism(
    size: int, layers: int, length: int, dtype: torch.dtype
) -> None:
    """4 L + 2 gathers and as many reduce-scatters, 2 L + 1 gathers more of what was kept in slices."""
    batch, hidden = 2, 50
    activation = batch * size * math.ceil(length / size) * hidden * dtype.itemsize
    each_way = 2 * layers + 1
    biases = {"attention_bias": True, "mlp_bias": True}
    for forward, backward, completed, shared in traffic(
        size, layers, length, dtype, sequence_parallel=True, **biases
    ):
        assert forward == {
            "all_gather": (each_way, each_way * activation),
            "reduce_scatter": (each_way, each_way * activation),
            "all_reduce": (2, 3 * 4 * batch * length),
        }
        assert backward == {
            "all_gather": (2 * each_way, 2 * each_way * activation),
            "reduce_scatter": (each_way, each_way * activation),
        }
        # One bucket for all norms and the biases of the row layers, in float32.
        assert completed == {"all_reduce": (1, (each_way + 2 * layers) * hidden * 4)}
        assert shared == {}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_shared_heads_cost_one_bucket_more(sequence_parallel: bool) -> None:
    """4 key/value heads over 8 ranks: their gradients, over the two ranks that share one."""
    layers, hidden, head_dim = 3, 50, 6
    for *_, completed, shared in traffic(8, layers, 8, torch.float32, sequence_parallel=sequence_parallel):
        assert shared == {"all_reduce": (1, 2 * layers * head_dim * hidden * 4)}
        assert completed == ({"all_reduce": (1, (2 * layers + 1) * hidden * 4)} if sequence_parallel else {})


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_generation_step_by_step(sequence_parallel: bool) -> None:
    """A token of `generate`: one collective an exit and entrance forward, and the gathered logits."""
    models = [small_model(torch.float32).eval() for _ in range(2)]
    layers = 2

    def work(group: SimulatedTPGroup) -> dict[str, int]:
        model: Any = shard_tensor_parallel(models[group.rank], group, sequence_parallel=sequence_parallel)
        with torch.no_grad():
            model(input_ids=random_tokens(length=1))
        return dict(group.counters.calls)

    expected = {"all_reduce": 2 * layers + 1, "all_gather": 1}
    if sequence_parallel:
        expected = {"reduce_scatter": 2 * layers + 1, "all_gather": 2 * layers + 1 + 1}
    for calls in simulate(SimulatedTPGroup.create(2), work):
        assert calls == expected


# ---------------------------------------------------------------------------------------------------
# What autograd keeps

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 688,
}


def kept(size: int, layers: int, length: int, *, sequence_parallel: bool, **changes: Any) -> list[int]:
    """Bytes kept by each rank of a model in bfloat16 throughout, batch 2."""
    settings = {**SHAPE, "num_hidden_layers": layers, **changes}
    models = [small_model(torch.bfloat16, **settings) for _ in range(size)]
    tokens = random_tokens(64, batch=2, length=length + 1)
    groups = SimulatedTPGroup.create(size)
    split = [
        shard_tensor_parallel(model, group, sequence_parallel=sequence_parallel)
        for model, group in zip(models, groups, strict=True)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ranks are threads already
    try:
        return simulate(groups, lambda group: saved_bytes(lambda: loss_of(split[group.rank], tokens), split))
    finally:
        torch.set_num_threads(threads)


def layer_bytes(size: int, length: int, *, sequence_parallel: bool, key_value_heads: int = 4) -> int:
    """One layer's, by hand: 16-bit activations, float32 statistics of the norms and of the softmax."""
    tokens = 2 * length
    residual = 2 * math.ceil(length / size) if sequence_parallel else tokens
    norms = 2 * residual * (2 * 256 * 2 + 4)  # input and output each, one rstd
    heads, key_value = 8 // size, max(1, key_value_heads // size)
    attention = tokens * ((2 * heads + 2 * key_value) * 32 * 2 + heads * 4)  # q, output, k, v; log-sum-exp
    return norms + attention + tokens * 2 * -(-688 // size) * 2  # gate and up


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("length", [64, 63])
def test_saved_bytes_of_a_layer_exactly(size: int, sequence_parallel: bool, length: int) -> None:
    two, three = (kept(size, layers, length, sequence_parallel=sequence_parallel) for layers in (2, 3))
    expected = layer_bytes(size, length, sequence_parallel=sequence_parallel)
    assert [more - fewer for more, fewer in zip(three, two, strict=True)] == [expected] * size


def test_shared_heads_are_kept_once_a_rank() -> None:
    two, three = (kept(4, layers, 64, sequence_parallel=True, num_key_value_heads=2) for layers in (2, 3))
    expected = layer_bytes(4, 64, sequence_parallel=True, key_value_heads=2)
    assert [more - fewer for more, fewer in zip(three, two, strict=True)] == [expected] * 4


@pytest.mark.parametrize("size", [2, 4])
def test_saved_bytes_by_the_formula(size: int) -> None:
    """Within 2 %: 8 h + [2 (h + 2 kv) + 2 h + 4 I] / t bytes a token and layer; sequences divide 8 h by t.

    4 I, gate and up: a SwiGLU spelled out keeps 8 I.
    """
    hidden, key_value, inner, tokens = 256, 4 * 32, 688, 2 * 64
    divided = (2 * (hidden + 2 * key_value) + 2 * hidden + 4 * inner) / size
    for sequence_parallel in (False, True):
        formula = tokens * (8 * hidden / (size if sequence_parallel else 1) + divided)
        two, three = (kept(size, layers, 64, sequence_parallel=sequence_parallel) for layers in (2, 3))
        for more, fewer in zip(three, two, strict=True):
            assert formula <= more - fewer <= 1.02 * formula


def test_autocast_keeps_the_cast_weights_besides() -> None:
    """Float32 weights under autocast: the same activations, and one 16-bit copy of each matrix."""
    tokens = random_tokens(64, batch=2, length=65)
    counts = {}
    for layers in (2, 3):
        model = small_model(torch.float32, **{**SHAPE, "num_hidden_layers": layers})
        split = shard_tensor_parallel(model, SimulatedTPGroup.create(1)[0])
        with torch.autocast("cpu", torch.bfloat16):
            counts[layers] = saved_bytes(lambda split=split: loss_of(split, tokens), [split])  # type: ignore[misc]
    matrices = 256 * (2 * 8 + 2 * 4) * 32 + 3 * 256 * 688
    assert counts[3] - counts[2] == layer_bytes(1, 64, sequence_parallel=False) + 2 * matrices


# ---------------------------------------------------------------------------------------------------
# Parameters on a rank


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_parameter_bytes_of_the_reference_model(size: int, tied: bool) -> None:
    """Argonne 2.0 with its real vocabulary: no rank holds more than 1.01 times its share."""
    settings = {**PRESETS["argonne-2.0"], "vocab_size": 151_665, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**settings))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    split: nn.Module = shard_tensor_parallel(model, SimulatedTPGroup.create(size)[size - 1])
    held = sum(p.numel() * p.element_size() for p in split.parameters())
    assert whole / size <= held <= 1.01 * whole / size


def test_parameter_bytes_with_shared_heads() -> None:
    """24 ranks hold 3 copies of each of 8 key/value heads: still no more than 1.15 times the share."""
    settings = {**PRESETS["argonne-2.0"], "vocab_size": 151_665}
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**settings))
    slice_map = build_slice_map(model, ARGONNE_PLAN, 24)
    held = sum(math.prod(slice_map.local_shape(name, 0)) for name in slice_map.names)
    assert held <= 1.15 * slice_map.numel() / 24
