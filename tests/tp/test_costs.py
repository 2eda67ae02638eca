"""The cost formulas, against what is counted and by hand."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch

from argonne.config.presets import PRESETS
from argonne.testing.models import loss_of, random_tokens, small_model
from argonne.tp.costs import (
    SHARED,
    ModelOutline,
    activation_bytes,
    readable_bytes,
    tensor_parallel,
)
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import measure_simulated, simulate
from model import ArgonneConfig, ArgonneModel
from tp_shard import shard_tensor_parallel


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_our_split_is_counted_as_by_formula(size: int, sequence_parallel: bool) -> None:
    # 4 key/value heads: at 8 ranks each is held twice, and their gradients take one more all-reduce.
    model, tokens = small_model(torch.float32, attention_bias=True), random_tokens(length=13)
    expected = tensor_parallel(
        ModelOutline.of(model), model, size, (2, 13), 4, sequence_parallel=sequence_parallel
    )
    ranks, slice_map = measure_simulated(model, tokens, size, sequence_parallel=sequence_parallel)
    for rank, measured in enumerate(ranks):
        assert measured.forward == expected.forward
        assert measured.step == expected.step
        held = sum(math.prod(slice_map.local_shape(name, rank)) for name in slice_map.names)
        assert held <= expected.parameters_per_rank
    assert (SHARED in expected.step) == (size == 8)
    if size == 8:
        assert expected.step[SHARED] == (1, 2 * 2 * (6 * 50 + 6) * 4)  # k and v of 2 layers: weight and bias
        assert expected.sharers == 2
    if not sequence_parallel:
        count, _ = expected.step["all_reduce"]
        assert count == 4 * 2 + 2 + 2


PLAIN: dict[str, Any] = {}
SWITCHES: tuple[dict[str, Any], ...] = (
    {"qk_norm": True},
    {"v_norm": True},
    {"sandwich_norm": True},
    {"logit_softcap": 15.0, "z_loss_weight": 0.01},
    {"interleaved_local_attention": True, "local_attention_window": 64},
    {"qk_norm": True, "v_norm": True, "sandwich_norm": True, "logit_softcap": 15.0},
)


@pytest.mark.parametrize(
    ("size", "sequence_parallel", "switches"),
    [
        (4, False, PLAIN),
        (4, True, PLAIN),
        *itertools.chain.from_iterable(
            [(1, False, one), (2, False, one), (2, True, one)] for one in (PLAIN, *SWITCHES)
        ),
    ],
)
def test_activations_are_what_autograd_keeps(
    size: int, sequence_parallel: bool, switches: dict[str, Any]
) -> None:
    settings = {**PRESETS["argonne-tiny"], "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1408}
    settings |= switches
    model = ArgonneModel(ArgonneConfig(**settings))
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    tokens = random_tokens(64, batch=2, length=65)
    groups = SimulatedTPGroup.create(size)
    models = [
        shard_tensor_parallel(copy.deepcopy(model), group, sequence_parallel=sequence_parallel)
        for group in groups
    ]
    weights = {p.untyped_storage().data_ptr() for one in models for p in one.parameters()}

    def work(group: SimulatedTPGroup) -> int:
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(models[group.rank], tokens)
        return sum(kept.values())

    formula = activation_bytes(ModelOutline.of(model), 2 * 64, size, sequence_parallel=sequence_parallel)
    for kept in simulate(groups, work):
        assert formula < kept < 1.05 * formula  # beyond it: statistics of norms and softmax, logits


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_400, "99.4 kB"),
        (123_456, "123 kB"),
        (999_600, "1.0 MB"),
    ],
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert readable_bytes(count) == text
