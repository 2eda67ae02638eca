"""Compiled blocks stay compiled for training alone: validation and samples add no graph."""

import pytest
import torch
from torch._dynamo.utils import counters

from argonne.ranks.recompute import compile_blocks
from argonne.training.generation import generate_text
from argonne.training.step import TrainingStep, Votes
from argonne.training.validation import validate
from tests.training.small_run import batch_of, trained_model, training_options
from tests.training.test_generation import Characters
from tests.training.test_validation import set_of


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_samples_and_validation_add_no_graph() -> None:
    """Steps, then a sample and a validation, then steps: as many graphs as before, and the same text."""
    torch._dynamo.reset()
    counters.clear()
    plain, trained = trained_model(), trained_model()
    compile_blocks(trained.model.blocks, backend="eager")
    for model in (plain, trained):
        step = TrainingStep(model, training_options(), 1)
        for number in range(2):
            step.run(batch_of(2, seed=number), number, votes=Votes())
    before = graphs()
    assert before >= 1
    text = generate_text(trained, Characters(), max_new_tokens=8, temperature=0.0)
    loss = validate(trained, set_of(trained.parallel), 2).loss
    assert graphs() == before
    assert text == generate_text(plain, Characters(), max_new_tokens=8, temperature=0.0)
    assert loss == pytest.approx(validate(plain, set_of(plain.parallel), 2).loss, rel=1e-5)
    step = TrainingStep(trained, training_options(), 1)
    step.run(batch_of(2, seed=2), 2, votes=Votes())
    assert graphs() == before
    compiled = trained.model.blocks[0]._compiled_call_impl
    assert compiled is not None
