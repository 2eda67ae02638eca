"""Entrances of a sharded model: one to each attention and MLP block, whichever way its code is called."""

import pytest
import torch
from torch import Tensor, nn

from argonne.testing.models import loss_of, random_tokens, small_model
from argonne.tp.entrances import attach_entrances
from argonne.tp.group import TPGroup
from argonne.tp.plan import TensorParallelPlan
from argonne.tp.regions import SequenceState
from argonne.verification.simulate import simulate
from tp_shard import SimulatedTPGroup, TensorParallelModel

SIZE = 2


class Doubled(nn.Module):
    """An attention or an MLP of foreign code, as far as entrances see it."""

    def forward(self, hidden_states: Tensor, scale: float = 2.0) -> Tensor:
        return hidden_states * scale


class Block(nn.Module):
    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.attn, self.mlp, self.by_keyword = Doubled(), Doubled(), by_keyword

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.by_keyword:
            return self.mlp(hidden_states=self.attn(hidden_states=hidden_states, scale=3.0), scale=5.0)
        return self.mlp(self.attn(hidden_states, 3.0), 5.0)


class Foreign(nn.Module):
    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(by_keyword)])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers[0](hidden)


def plan(mlp: str) -> TensorParallelPlan:
    """Of code that has no method for an entrance to stand in for."""
    return TensorParallelPlan(
        rules=(),
        attention="layers.*.attn",
        mlp=mlp,
        first_block="layers.0",
        final_norm="norm",
        embedding="embed",
        head="head",
    )


def passed(
    by_keyword: bool, group: TPGroup, sequence: SequenceState, mlp: str = "layers.*.mlp"
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """(output, gradient of the input of the output's sum, collectives) of (2, 4, 3) hidden states."""
    model = Foreign(by_keyword)
    attach_entrances(model, plan(mlp), group, sequence)
    hidden = HIDDEN.clone().requires_grad_()
    group.counters.reset()
    output = model(hidden)
    output.sum().backward()
    assert hidden.grad is not None
    return output.detach(), hidden.grad, dict(group.counters.calls)


HIDDEN = torch.arange(24.0).reshape(2, 4, 3)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_an_entrance_in_front_of_each_block_sums_its_gradients(by_keyword: bool) -> None:
    """Every rank's block is a part of the layer: what comes back of its input is summed over the ranks."""
    ranks = simulate(SimulatedTPGroup.create(SIZE), lambda group: passed(by_keyword, group, SequenceState()))
    for output, gradient, calls in ranks:
        assert output.equal(15.0 * HIDDEN)
        assert gradient.eq(15.0 * SIZE * SIZE).all()  # once in front of attention, once of the MLP
        assert calls == {"all_reduce": 2}


@pytest.mark.parametrize("by_keyword", [False, True])
def test_with_a_split_sequence_the_first_block_splits_and_attention_gathers(by_keyword: bool) -> None:
    def work(group: SimulatedTPGroup) -> tuple[Tensor, Tensor, dict[str, int]]:
        sequence = SequenceState(enabled=True, seq_len=HIDDEN.shape[1])
        return passed(by_keyword, group, sequence, mlp="no MLP")

    for output, gradient, calls in simulate(SimulatedTPGroup.create(SIZE), work):
        assert output.equal(15.0 * HIDDEN)
        assert gradient.eq(15.0 * SIZE).all()
        assert calls == {"all_gather": 2, "reduce_scatter": 1}


def test_one_rank_has_no_entrances() -> None:
    (group,) = SimulatedTPGroup.create(1)
    output, gradient, calls = passed(False, group, SequenceState(enabled=True, seq_len=4))
    assert output.equal(15.0 * HIDDEN) and gradient.eq(15.0).all() and calls == {}


def test_products_of_one_input_share_their_entrance() -> None:
    """Of the real model: attention and MLP each return one reduction, whatever they multiply."""

    def work(group: SimulatedTPGroup) -> tuple[dict[str, int], dict[str, int]]:
        model = TensorParallelModel(models[group.rank], group)
        loss = loss_of(model, random_tokens())
        forward = dict(group.counters.calls)
        group.counters.reset()
        loss.backward()
        return forward, dict(group.counters.calls)

    models = [small_model() for _ in range(SIZE)]
    layers = models[0].config.num_hidden_layers
    for _, backward in simulate(SimulatedTPGroup.create(SIZE), work):
        # Two entrances a layer, and the head's.
        assert backward["all_reduce"] == 2 * layers + 1
