"""Dropout of a split GPT-2: replicated activations stay equal over ranks, heads get masks of their own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from argonne.errors import ConfigError
from argonne.testing.distributed import run_ranks
from argonne.testing.models import random_tokens, relative_error
from argonne.verification.simulate import simulate
from tests.tp.hf_models import VOCAB, build, gradients_of
from tp_shard import SimulatedTPGroup, gather_state_dict, shard_tensor_parallel

IDS = random_tokens(VOCAB, length=13)


def dropping(probability: float = 0.3, attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=8, n_positions=64, bos_token_id=None,
        eos_token_id=None, resid_pdrop=probability, embd_pdrop=probability, attn_pdrop=probability,
        initializer_range=0.15,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation(attention)
    return model.train()


def trained_pass(model: Any) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    output = model(input_ids=IDS, labels=IDS, use_cache=False, output_hidden_states=True)
    output.loss.backward()
    model.tensor_parallel.sum_partial_gradients(gradients_of(model))
    hidden = [state.detach() for state in output.hidden_states]
    return float(output.loss), hidden, gather_state_dict(model, gradients=True)


def seeded_rank(
    rank: int, world_size: int, attention: str, checkpointing: bool, seeds: list[int]
) -> tuple[tuple[float, list[Tensor], dict[str, Tensor]], float, dict[str, int]]:
    model: Any = shard_tensor_parallel(dropping(attention=attention))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seeds[rank])
    model.tensor_parallel.group.counters.reset()
    return trained_pass(model), torch.rand(()).item(), dict(model.tensor_parallel.group.counters.calls)


@pytest.mark.libraries
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ranks_with_other_seeds_stay_together(attention: str) -> None:
    """Hidden states and gradients of all ranks are equal bit for bit; recomputed blocks drop the same."""
    (first, drawn, _), (second, other_drawn, _) = run_ranks(seeded_rank, 2, attention, False, [1, 2])
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
    assert drawn != other_drawn, "each rank goes on with a random state of its own"
    (again, _, _), _ = run_ranks(seeded_rank, 2, attention, True, [1, 2])
    assert again[0] == first[0]
    for name, grad in first[2].items():
        assert relative_error(again[2][name], grad) < 1e-5, name
    (moved, _, _), _ = run_ranks(seeded_rank, 2, attention, False, [3, 2])
    assert moved[0] != first[0], "another seed, other masks"


def score_masks(rank: int, world_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which attention weights a rank's first layer drops, and which elements after its row layer."""
    model: Any = shard_tensor_parallel(dropping(attention="eager"))
    seen: list[Tensor] = []
    dropout = model.transformer.h[0].attn.resid_dropout
    dropout.register_forward_hook(lambda _, args, output: seen.append((output == 0) & (args[0] != 0)))
    torch.manual_seed(seed)
    weights = model(input_ids=IDS, use_cache=False, output_attentions=True).attentions[0]
    seen_by_causal = torch.ones_like(weights).tril().bool()
    return (weights == 0) & seen_by_causal, seen[0]


def test_heads_of_all_ranks_get_different_masks_though_the_seed_is_one() -> None:
    (heads, residual), (other_heads, other_residual) = run_ranks(score_masks, 2, 5)
    every = torch.cat((heads, other_heads), dim=1).transpose(0, 1).flatten(1)
    assert every.shape[0] == 8 and len({tuple(mask.tolist()) for mask in every}) == 8
    assert torch.equal(residual, other_residual) and 0.2 < residual.float().mean() < 0.4


def without_dropout(rank: int, world_size: int) -> tuple[Tensor, dict[str, int], float]:
    model: Any = shard_tensor_parallel(dropping(0.0))
    torch.manual_seed(rank)
    model.tensor_parallel.group.counters.reset()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return loss.detach(), dict(model.tensor_parallel.group.counters.calls), torch.rand(()).item()


def test_without_dropout_it_is_the_unsplit_model_and_nothing_is_drawn() -> None:
    expected = dropping(0.0)(input_ids=IDS, labels=IDS, use_cache=False).loss
    for rank, (loss, calls, drawn) in enumerate(run_ranks(without_dropout, 2)):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
        assert calls == {"all_reduce": 2 * 2 + 1 + 2}
        assert drawn == torch.rand((), generator=torch.Generator().manual_seed(rank)).item()


def attention_dropout_rank(rank: int, world_size: int) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    """Llama draws its attention dropout inside the fused kernel, from no module of its own."""
    model: Any = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.4
    shard_tensor_parallel(model)
    torch.manual_seed(10 + rank)
    return trained_pass(model)


def test_attention_dropout_of_llama_keeps_ranks_together() -> None:
    first, second = run_ranks(attention_dropout_rank, 2)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


def test_simulated_ranks_refuse_dropout() -> None:
    copies = [copy.deepcopy(dropping()) for _ in range(2)]

    def work(group: SimulatedTPGroup) -> Any:
        return shard_tensor_parallel(copies[group.rank], group)(input_ids=IDS, labels=IDS)

    with pytest.raises(ConfigError, match="simulated ranks share one random state"):
        simulate(SimulatedTPGroup.create(2), work)
