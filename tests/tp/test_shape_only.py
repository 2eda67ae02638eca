"""Shapes without a model are the model's."""

from typing import Any

import pytest
import torch

from argonne.config.presets import PRESETS
from argonne.tp.costs import ModelOutline, tensor_parallel
from argonne.tp.shape_only import shape_only
from model import ArgonneConfig, ArgonneModel

BIASED = {**PRESETS["argonne-tiny"], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}


@pytest.mark.parametrize("settings", [*PRESETS.values(), BIASED])
def test_names_shapes_and_order(settings: dict[str, Any]) -> None:
    settings = {"vocab_size": 1003, **settings}
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**settings))
    outline = shape_only(settings)
    expected = [(name, p.shape) for name, p in model.named_parameters()]
    assert [(name, p.shape) for name, p in outline.named_parameters()] == expected
    degree = settings["num_key_value_heads"]
    assert tensor_parallel(ModelOutline.of(outline), outline, degree, (2, 64), 2, sequence_parallel=True) == (
        tensor_parallel(ModelOutline.of(model), model, degree, (2, 64), 2, sequence_parallel=True)
    )
