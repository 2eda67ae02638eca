"""One optimizer step: accumulation, clipping and update are those of plain torch; bad steps; votes."""

import dataclasses

import pytest
import torch

from argonne.testing.models import relative_error
from argonne.training.step import TrainingStep, Votes
from model import ArgonneConfig, ArgonneModel
from tests.model.documents_alone import alone, ids_of, random_spans
from tests.training.small_run import BLOCK, SETTINGS, batch_of, trained_model, training_options


def test_steps_are_plain_torchs() -> None:
    """Two micro-batches a step, a clip that bites, and the schedule's rates, against AdamW on one model."""
    options = training_options(grad_clip=0.5)
    trained = trained_model(grad_clip=0.5)
    plain = ArgonneModel(ArgonneConfig(**SETTINGS))
    plain.load_state_dict(trained.model.state_dict())
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=1.0, betas=options.adam_betas, weight_decay=options.weight_decay
    )
    step = TrainingStep(trained, options, accumulation=2)
    for number, rate in enumerate((1e-3, 5.5e-3, 1e-2)):
        batch = batch_of(4, seed=number)
        result = step.run(batch, number, votes=Votes())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        tokens = batch.tokens.long()
        logits = plain(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        assert norm > 0.5 and result.lr == pytest.approx(rate)
        assert result.totals.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.totals.grad_norm == pytest.approx(norm.item(), rel=3e-4)
        assert not result.skipped and result.votes == Votes()
    for name, weight in plain.named_parameters():
        assert relative_error(trained.parameters()[name], weight.detach()) < 2e-3, name


def test_a_step_that_is_not_finite_leaves_weights_and_adam_alone() -> None:
    trained = trained_model()
    step = TrainingStep(trained, training_options(), accumulation=1)
    step.run(batch_of(2), 0, votes=Votes())
    before = {name: tensor.clone() for name, tensor in trained.parameters().items()}
    moments = {name: state["exp_avg"].clone() for name, state in trained.adam().items()}
    broken = trained.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    results = [step.run(batch_of(2), number, votes=Votes()) for number in range(1, 11)]
    assert all(result.skipped for result in results)
    assert [result.too_many_skipped for result in results] == [False] * 9 + [True]
    for name, tensor in trained.parameters().items():
        assert torch.equal(tensor, before[name]) and torch.equal(
            trained.adam()[name]["exp_avg"], moments[name]
        )
    broken.remove()
    assert not step.run(batch_of(2), 11, votes=Votes()).skipped


def test_documents_of_the_batch_reach_the_model() -> None:
    """Two micro-batches of packed documents: the loss is that of each document alone."""
    trained = trained_model()
    spans = random_spans(4, BLOCK, seed=2)
    batch = dataclasses.replace(batch_of(4), document_ids=ids_of(spans).int())
    expected, _ = alone(trained.model, batch.tokens.long(), spans)
    plain, _ = alone(trained.model, batch.tokens.long(), [[0, BLOCK]] * 4)
    result = TrainingStep(trained, training_options(), accumulation=2).run(batch, 0, votes=Votes())
    assert result.totals.loss == pytest.approx(expected, rel=1e-5)
    assert abs(plain - expected) > 1e-3


def test_votes_of_one_rank_come_back() -> None:
    step = TrainingStep(trained_model(), training_options(), accumulation=1)
    for votes in (
        Votes(stop=True),
        Votes(busy=True),
        Votes(spoiled=True),
        Votes(failed=True),
        Votes(stop=True, spoiled=True),
    ):
        assert step.run(batch_of(2), 0, votes=votes).votes == votes


def test_any_ranks_vote_counts() -> None:
    ranks = (Votes(), Votes(busy=True), Votes(busy=True, stop=True))
    sums = [sum(column) for column in zip(*(votes.numbers() for votes in ranks), strict=True)]
    assert sums == [1.0, 2.0, 0.0, 0.0] and Votes.of_any(sums) == Votes(stop=True, busy=True)
