"""The family's switches under the split: loss, every gradient and logits at every degree."""

from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.tp.loss import vocab_parallel_cross_entropy
from argonne.verification.simulate import simulate
from model import ArgonneModel
from tests.model.family_reference import SWITCHES, loss_and_gradients
from tp_shard import SimulatedTPGroup, gather_state_dict, shard_tensor_parallel


def split_gradients(
    model: ArgonneModel, group: SimulatedTPGroup, tokens: Tensor, sequence_parallel: bool
) -> tuple[float, dict[str, Tensor], Tensor]:
    shard_tensor_parallel(model, group, sequence_parallel=sequence_parallel)
    loss = loss_of(model, tokens)
    loss.backward()
    state: Any = model.tensor_parallel
    state.sum_partial_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    gradients = gather_state_dict(model, gradients=True)
    with torch.no_grad():
        return loss.item(), gradients, model(input_ids=tokens[:, :-1]).logits


def check(tp_size: int, sequence_parallel: bool, changes: dict[str, Any], length: int = 14) -> None:
    tokens = random_tokens(length=length)
    whole = small_model(**changes)
    expected, gradients = loss_and_gradients(whole, tokens)
    with torch.no_grad():
        logits = whole(input_ids=tokens[:, :-1]).logits
    models = [small_model(**changes) for _ in range(tp_size)]  # not in the threads: they share a generator
    ranks = simulate(
        SimulatedTPGroup.create(tp_size),
        lambda group: split_gradients(models[group.rank], group, tokens, sequence_parallel),
    )
    for loss, actual, local_logits in ranks:
        assert abs(loss - expected) <= 1e-10 * abs(expected)
        assert actual.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert relative_error(actual[name], gradient) <= 1e-10, name
        assert relative_error(local_logits, logits) <= 1e-10


@pytest.mark.parametrize(
    ("tp_size", "sequence_parallel", "key_value_heads"),
    [(1, False, 4), (2, False, 4), (2, True, 4), (4, True, 2), (8, False, 2), (8, True, 4)],
)
def test_every_switch_at_every_degree(tp_size: int, sequence_parallel: bool, key_value_heads: int) -> None:
    check(tp_size, sequence_parallel, {**SWITCHES, "num_key_value_heads": key_value_heads})


@pytest.mark.slow
def test_random_switches() -> None:
    generator = torch.Generator().manual_seed(30)
    print("seed 30")
    for _ in range(30):
        on = (torch.rand(len(SWITCHES) + 3, generator=generator) < 0.5).tolist()
        changes = {key: value for (key, value), chosen in zip(SWITCHES.items(), on, strict=False) if chosen}
        changes.setdefault("local_attention_window", 3)
        changes["tie_word_embeddings"], changes["attention_bias"] = on[-1], on[-2]
        check(2 ** int(torch.randint(0, 4, (1,), generator=generator)), on[-3], changes, length=17)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_capped_loss_and_z_loss_on_vocabulary_slices(reduction: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (5 * torch.randn(6, 11, generator=generator, dtype=torch.float64)).to(dtype).double()
    targets = torch.tensor([0, 10, -100, 3, 7, 5])
    whole = logits.clone().requires_grad_()
    capped = 4.0 * torch.tanh(whole / 4.0)
    losses = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    losses = losses + 0.3 * torch.where(targets == -100, 0.0, capped.logsumexp(-1).square())
    reduced = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 5}[reduction]
    reduced.sum().backward()

    def work(group: SimulatedTPGroup) -> tuple[Tensor, Tensor]:
        local = torch.zeros(6, 4, dtype=dtype)  # 12 columns over 3 ranks: the last one is padding
        part = logits[:, 4 * group.rank : 4 * group.rank + 4]
        local[:, : part.shape[1]] = part.to(dtype)
        local.requires_grad_()
        loss = vocab_parallel_cross_entropy(
            local, targets, group, vocab_size=11, reduction=reduction, logit_softcap=4.0, z_loss_weight=0.3
        )
        loss.sum().backward()
        assert local.grad is not None
        return loss.detach(), local.grad

    ranks = simulate(SimulatedTPGroup.create(3), work)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert whole.grad is not None
    assert relative_error(torch.cat([grad for _, grad in ranks], 1)[:, :11], whole.grad) < tolerance
    for loss, _ in ranks:
        assert relative_error(loss, reduced) < max(tolerance, 1e-6 if dtype is not torch.float64 else 0)
    assert ranks[2][1][:, 3].abs().max() == 0
