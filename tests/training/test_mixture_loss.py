"""The loss of each source of a mixture: by hand from logits, in any layout, at no further collective."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from argonne.config.options import ParallelOptions
from argonne.testing.distributed import run_ranks
from argonne.training.build import build_model, fill_weights
from argonne.training.step import TrainingStep, Votes
from data_stream import StepBatch
from model import ArgonneConfig, ArgonneModel
from tests.training.small_run import BLOCK, SEED, SETTINGS, batch_of, trained_model, training_options

SOURCES = [0, 2, 2, 0, 0, 2, 0, 0]
"""Of eight samples; source 1 has none."""


def mixed_batch() -> StepBatch:
    return replace(batch_of(len(SOURCES), seed=3), sources=torch.tensor(SOURCES))


def sums_by_hand() -> list[float]:
    """From the logits of the unsharded model and torch's cross entropy."""
    trained = trained_model()
    plain = ArgonneModel(ArgonneConfig(**SETTINGS))
    plain.load_state_dict(trained.model.state_dict())
    tokens = mixed_batch().tokens.long()
    with torch.no_grad():
        logits = plain(input_ids=tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(-1, BLOCK)
    return [float(losses[torch.tensor(SOURCES) == source].sum()) for source in range(3)]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_sums_of_one_process(accumulation: int) -> None:
    options = training_options(batch_size=len(SOURCES) // accumulation)
    step = TrainingStep(trained_model(), options, accumulation)
    totals = step.run(mixed_batch(), 0, votes=Votes(busy=True)).totals
    assert totals.source_losses == pytest.approx(sums_by_hand(), rel=1e-5)
    assert sum(totals.source_losses) / (len(SOURCES) * BLOCK) == pytest.approx(totals.loss, rel=1e-6)
    assert totals.votes == (0.0, 1.0, 0.0, 0.0)


def step_of_rank(rank: int, world_size: int, tp_size: int, options: dict[str, Any]) -> tuple[Any, Any, int]:
    """(sums by source, loss, all-reduces of the world's group) of one step."""
    from argonne.testing.distributed import make_parallel

    parallel = make_parallel(rank, world_size, tp_size)
    training = training_options(batch_size=2)
    trained = build_model(SETTINGS, ParallelOptions(**options), training, parallel)
    fill_weights(trained, None, SEED)
    accumulation = len(SOURCES) // (2 * parallel.dp_size)
    counted = []
    reduce = torch.distributed.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(kwargs.get("group"))
        return reduce(*args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        totals = TrainingStep(trained, training, accumulation).run(mixed_batch(), 0, votes=Votes()).totals
    finally:
        torch.distributed.all_reduce = reduce
    return totals.source_losses, totals.loss, sum(group is parallel.world_group for group in counted)


@pytest.mark.parametrize(
    ("tp_size", "options"),
    [
        (2, {}),
        (2, {"sequence_parallel": True, "activation_checkpointing": "full"}),
        (1, {}),
        (1, {"data_parallel": "ddp"}),
    ],
)
def test_sums_of_two_ranks(tp_size: int, options: dict[str, Any]) -> None:
    """Tensor and data parallel: the same on both ranks, in the one all-reduce of the step."""
    for sums, loss, reduces in run_ranks(step_of_rank, 2, tp_size, options):
        assert sums == pytest.approx(sums_by_hand(), rel=1e-5)
        assert sum(sums) / (len(SOURCES) * BLOCK) == pytest.approx(loss, rel=1e-6)
        assert reduces == 1


def test_a_step_without_a_mixture_has_no_sums() -> None:
    totals = TrainingStep(trained_model(), training_options(), 1).run(batch_of(2), 0, votes=Votes()).totals
    assert totals.source_losses == ()
