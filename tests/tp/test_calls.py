"""However a sharded model is called, it computes what the unsharded model does."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.tp.calls import read_call
from argonne.verification.simulate import simulate
from model import ArgonneModel
from tests.tp.unsharded import Grads
from tp_shard import (
    SimulatedTPGroup,
    TensorParallelModel,
    gather_state_dict,
)

TOKENS = random_tokens(length=9)


def own_loss(model: Any, tokens: Tensor, keep: int = 0) -> Tensor:
    """A loss that the caller makes from gathered logits; of the last ``keep`` positions where given."""
    scores = model(input_ids=tokens[:, :-1], logits_to_keep=keep).logits.double()
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:][:, -keep:].flatten())


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("keep", [0, 3])
def test_gathered_logits_carry_the_whole_gradient(sequence_parallel: bool, keep: int) -> None:
    tokens = random_tokens(length=8)
    unsharded = small_model(torch.float64)
    own_loss(unsharded, tokens, keep).backward()
    copies = [small_model(torch.float64) for _ in range(4)]

    def work(group: SimulatedTPGroup) -> Grads:
        model = TensorParallelModel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        own_loss(model, tokens, keep).backward()
        model.sum_partial_gradients()
        return gather_state_dict(model.model, gradients=True)

    for gradients in simulate(SimulatedTPGroup.create(4), work):
        for name, parameter in unsharded.named_parameters():
            assert parameter.grad is not None
            assert relative_error(gradients[name], parameter.grad) < 1e-10, name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_labels_by_position_and_kept_positions(sequence_parallel: bool) -> None:
    """However it is called, the loss is that of the unsharded model."""
    tokens = random_tokens(length=9)
    unsharded = small_model(torch.float64)
    expected = [
        unsharded(tokens, None, None, None, None, tokens).loss,
        unsharded(tokens, shift_labels=tokens[:, -2:], logits_to_keep=2).loss,
        unsharded(tokens, shift_labels=tokens, num_items_in_batch=7).loss,
    ]
    copies = [small_model(torch.float64) for _ in range(2)]

    def work(group: SimulatedTPGroup) -> list[Tensor]:
        model = TensorParallelModel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        return [
            model(tokens, None, None, None, None, tokens).loss,
            model(tokens, shift_labels=tokens[:, -2:], logits_to_keep=2).loss,
            model(tokens, shift_labels=tokens, num_items_in_batch=7).loss,
        ]

    for losses in simulate(SimulatedTPGroup.create(2), work):
        torch.testing.assert_close(losses, expected)


def test_embedded_inputs() -> None:
    tokens = random_tokens(length=9)
    unsharded = small_model(torch.float64)
    embedded = unsharded.embed_tokens(tokens).detach()
    expected = unsharded(inputs_embeds=embedded, shift_labels=tokens).loss
    copies = [small_model(torch.float64) for _ in range(4)]

    def work(group: SimulatedTPGroup) -> Tensor:
        split = TensorParallelModel(copies[group.rank], group)
        return split(inputs_embeds=embedded, shift_labels=tokens).loss

    for loss in simulate(SimulatedTPGroup.create(2), work):
        torch.testing.assert_close(loss, expected)
    split = TensorParallelModel(copies[2], SimulatedTPGroup.create(2)[0], sequence_parallel=True)
    with pytest.raises(ValueError, match="inputs_embeds cannot be used with sequence parallelism"):
        split(inputs_embeds=embedded)
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        split()


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {"input_ids": TOKENS}, (9, False, False, False)),
        ((TOKENS,), {"labels": TOKENS}, (9, False, True, False)),
        ((TOKENS,), {"shift_labels": TOKENS, "logits_to_keep": 2}, (9, False, True, True)),
        ((), {"inputs_embeds": TOKENS, "logits_to_keep": torch.tensor([1, 3])}, (9, True, False, True)),
    ],
)
def test_what_a_call_tells(args: Any, kwargs: dict[str, Any], expected: tuple[Any, ...]) -> None:
    call = read_call(inspect.signature(ArgonneModel.forward), (None, *args), kwargs)
    assert call is not None
    assert (call.seq_len, call.by_embeddings, call.wants_loss, call.picks_positions) == expected


def test_shift_labels_alone_make_no_loss_where_the_model_takes_labels_only() -> None:
    call = read_call(inspect.signature(LlamaForCausalLM.forward), (None, TOKENS), {"shift_labels": TOKENS})
    assert call is not None and not call.wants_loss
    assert read_call(inspect.signature(LlamaForCausalLM.forward), (None,), {}) is None
