"""Other ways to split a model: their cost formulas, against what is counted and by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from argonne.config.presets import PRESETS
from argonne.testing.models import loss_of, random_tokens, small_model
from argonne.tp.costs import (
    SplitCost,
    calls,
    payload,
)
from argonne.tp.group import SimulatedTPGroup
from argonne.tp.strategies import all_splits
from argonne.verification.simulate import simulate
from model import ArgonneConfig, ArgonneModel
from tp_shard import ColumnParallelLinear, VocabParallelEmbedding


def empty_model(**settings: Any) -> ArgonneModel:
    with torch.device("meta"):
        return ArgonneModel(ArgonneConfig(**settings))


def reference_model() -> ArgonneModel:
    return empty_model(**{**PRESETS["argonne-2.0"], "vocab_size": 151_665})


def by_name(splits: tuple[SplitCost, ...]) -> dict[str, SplitCost]:
    return {split.name: split for split in splits}


def split_naively(model: ArgonneModel, group: SimulatedTPGroup) -> nn.Module:
    """Each linear layer for itself, its output gathered; the embedding summed."""
    for name, module in list(model.named_modules()):
        replacement: nn.Module
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features, module.bias is not None)
            replacement = ColumnParallelLinear(*shape, group=group, gather_output=True)
        elif isinstance(module, nn.Embedding):
            replacement = VocabParallelEmbedding(module.num_embeddings, module.embedding_dim, group=group)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)
    return model


@pytest.mark.parametrize("size", [2, 4])
def test_the_naive_split_is_counted_as_by_formula(size: int) -> None:
    model = small_model(torch.float32, tie_word_embeddings=False, mlp_bias=True)
    tokens = random_tokens(length=13)  # 12 positions go in
    naive = by_name(all_splits(model, size, (2, 12), 4))["naive (projections alone)"]

    def work(group: SimulatedTPGroup) -> tuple[Any, Any, int]:
        split = split_naively(copy.deepcopy(model), group)
        loss = loss_of(split, tokens)
        forward = group.counters.totals()
        loss.backward()
        return forward, group.counters.totals(), sum(p.numel() for p in split.parameters())

    for forward, step, held in simulate(SimulatedTPGroup.create(size), work):
        assert forward == naive.forward
        assert step == naive.step
        assert held == naive.parameters_per_rank


def test_the_reference_model_by_hand() -> None:
    splits = by_name(all_splits(reference_model(), 8, (4, 4096), 2))
    tokens, hidden, layers = 4 * 4096, 4080, 24
    parameters = (
        151_665 * hidden + layers * (hidden * (4080 + 2 * 1360 + 4080 + 3 * 11008) + 2 * hidden) + hidden
    )
    assert parameters == 4_918_072_800
    message = tokens * hidden * 2

    ours = splits["tensor parallel (here)"]
    assert calls(ours.forward) == 2 * layers + 1 + 2
    assert calls(ours.step) == 4 * layers + 2 + 2
    assert payload(ours.step) == (4 * layers + 2) * message + 3 * tokens * 4
    assert ours.sent_bytes == round(payload(ours.step) * 2 * 7 / 8)
    assert (
        ours.parameters_per_rank
        == 18_960 * hidden + layers * (hidden * (510 + 2 * 170 + 510 + 3 * 1376) + 2 * hidden) + hidden
    )

    pipeline = splits["pipeline parallel"]
    block = hidden * (4080 + 2 * 1360 + 4080 + 3 * 11008) + 2 * hidden
    assert pipeline.parameters_per_rank == 3 * block + 151_665 * hidden + hidden
    assert pipeline.step == {
        "send": (2, message + 151_665 * hidden * 4)
    }  # tied: the ends exchange a gradient
    whole = splits["naive (projections alone)"].activation_bytes
    assert pipeline.activation_bytes == pytest.approx(whole / 8)

    sharded = splits["FSDP (ZeRO-3)"]
    assert calls(sharded.step) == 25 + 24 + 25
    assert payload(sharded.step) == 2 * parameters + 2 * layers * block + 4 * parameters
    assert sharded.activation_bytes == pytest.approx(whole / 8)
    replicated = splits["data parallel (DDP)"]
    assert replicated.sent_bytes == round(4 * parameters * 2 * 7 / 8)
    assert replicated.state_bytes == 16 * parameters


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_pipeline_stage_sends_once_each_way(ranks: int) -> None:
    model = empty_model(**{**PRESETS["argonne-tiny"], "vocab_size": 1003, "tie_word_embeddings": False,
                           "num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 6})  # fmt: skip
    pipeline = by_name(all_splits(model, ranks, (2, 32), 2))["pipeline parallel"]
    message = 2 * 32 * 128 * 2
    assert pipeline.forward == {"send": (1, message)}
    assert pipeline.step == {"send": (2, 2 * message) if ranks > 2 else (1, message)}
