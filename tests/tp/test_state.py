"""What a sharded model carries: slices out of the whole and back, partial gradients summed once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from argonne.testing.models import small_model
from argonne.tp.slices import SliceMap, even_cut
from argonne.tp.state import gather_state_dict, gather_unsharded, take_slice, unsharded_state_dict
from argonne.verification.simulate import simulate
from tp_shard import SimulatedTPGroup, TensorParallelModel

SIZE = 2


def test_a_slice_is_a_padded_copy() -> None:
    slices = SliceMap({"w": ((5, 3), even_cut(5, 2, 0))}, tp_size=2)
    whole = torch.arange(15.0).reshape(5, 3)
    first, second = (take_slice(whole, slices, "w", rank) for rank in range(2))
    assert first.equal(whole[:3])
    assert second[:2].equal(whole[3:]) and second[2].eq(0).all()
    first.zero_()
    assert whole[0, 1] == 1.0
    assert take_slice(whole.to(torch.bfloat16), slices, "w", 0).dtype is torch.bfloat16


@pytest.fixture(scope="module")
def sharded() -> tuple[dict[str, Tensor], list[tuple[Any, ...]]]:
    """The whole weights, and of each rank what it gathers and what sums of gradients it made."""
    changes: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    whole = {name: tensor.clone() for name, tensor in small_model(**changes).state_dict().items()}
    models = [small_model(**changes) for _ in range(SIZE)]

    def work(group: SimulatedTPGroup) -> tuple[Any, ...]:
        model: nn.Module = TensorParallelModel(models[group.rank], group, sequence_parallel=True).model
        state: Any = model.tensor_parallel
        gradients = {
            name: torch.full_like(parameter, 1.0 + group.rank) for name, parameter in model.named_parameters()
        }
        group.counters.reset()
        state.sum_partial_gradients(gradients)
        calls = group.counters.total_calls
        locals_ = {name: tensor.detach() for name, tensor in model.named_parameters()}
        one = gather_unsharded(locals_["embed_tokens.weight"], "embed_tokens.weight", state)
        gathered, loaded = gather_state_dict(model), unsharded_state_dict(model)
        without = gather_state_dict(model, gradients=True)
        return gathered, loaded, one, gradients, set(state.summed), calls, without

    return whole, simulate(SimulatedTPGroup.create(SIZE), work)


def test_every_rank_gathers_the_whole(sharded: tuple[dict[str, Tensor], list[tuple[Any, ...]]]) -> None:
    whole, ranks = sharded
    for gathered, _, one, *_ in ranks:
        assert one.equal(whole["embed_tokens.weight"])
        assert all(tensor.equal(whole[name]) for name, tensor in gathered.items())
        assert gathered.keys() == whole.keys() - {"lm_head.weight"}  # tied: one parameter


def test_an_unsharded_model_loads_it_strictly(
    sharded: tuple[dict[str, Tensor], list[tuple[Any, ...]]],
) -> None:
    whole, ranks = sharded
    for _, loaded, *_ in ranks:
        assert loaded.keys() == whole.keys()
        assert loaded["lm_head.weight"].equal(whole["embed_tokens.weight"])
    other = small_model(seed=9, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    other.load_state_dict(ranks[0][1], strict=True)
    assert all(tensor.equal(whole[name]) for name, tensor in other.state_dict().items())


def test_partial_gradients_are_summed_in_one_bucket(
    sharded: tuple[dict[str, Tensor], list[tuple[Any, ...]]],
) -> None:
    for rank, (*_, gradients, summed, calls, _) in enumerate(sharded[1]):
        assert "blocks.0.input_norm.weight" in summed and "norm.weight" in summed
        assert calls == 1
        for name, gradient in gradients.items():
            assert gradient.eq(3.0 if name in summed else 1.0 + rank).all(), name


def test_without_gradients_none_are_gathered(
    sharded: tuple[dict[str, Tensor], list[tuple[Any, ...]]],
) -> None:
    assert all(rank[-1] == {} for rank in sharded[1])
