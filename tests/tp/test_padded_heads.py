"""Heads and widths stored padded: the same losses, gradients and logits, and zeros that stay zeros."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import model as decoder
from argonne.errors import ConfigError
from argonne.testing.models import loss_of, random_tokens, relative_error, small_model
from argonne.tp.architectures import plan_for
from argonne.tp.costs import ModelOutline
from argonne.tp.head_cuts import head_cut
from argonne.tp.initial_values import initialise_parameters
from argonne.tp.plan import HeadCounts, build_slice_map
from argonne.tp.slices import SliceMap, padded_slice_size
from argonne.verification.simulate import measure_simulated, simulate
from tests.model.documents_alone import together
from tests.model.family_reference import SWITCHES
from tests.tp.hf_models import build
from tests.tp.test_documents import batch_and_spans
from tests.tp.test_slices import check_cut, check_map
from tests.tp.test_uneven_heads import decoded
from tp_shard import (
    SimulatedTPGroup,
    gather_state_dict,
    padding_text,
    shard_tensor_parallel,
    tensor_parallel_cost,
    unsharded_state_dict,
)

PAD = 8
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}


def padding_of(local: Tensor, slice_map: SliceMap, name: str, rank: int) -> Tensor:
    """The elements of a local tensor that are in no box."""
    mask = torch.ones(local.shape, dtype=torch.bool)
    for box in slice_map.rectangles(name, rank):
        mask[box.local_index] = False
    return local.detach()[mask]


# ---------------------------------------------------------------------------------------------------
# Where heads lie


@pytest.mark.parametrize(("query", "key_value", "tp_size"), [(24, 8, 8), (24, 8, 7), (8, 2, 8), (4, 4, 1)])
@pytest.mark.parametrize(("head_dim", "stored_dim"), [(6, 8), (10, 16), (170, 176)])
def test_each_half_of_a_head_is_padded_alone(
    query: int, key_value: int, tp_size: int, head_dim: int, stored_dim: int
) -> None:
    for heads in (query, key_value):
        cut = head_cut(heads, head_dim, tp_size, 0, query_heads=query, stored_dim=stored_dim)
        check_cut((heads * head_dim, 2), cut, tp_size)
        as_it_is = head_cut(heads, head_dim, tp_size, 0, query_heads=query)
        for rank, pieces in enumerate(cut.pieces):
            held = cut.local_sizes[rank] // stored_dim
            assert held * head_dim == as_it_is.local_sizes[rank] and len(pieces) == 2 * held
            assert {piece.local_start % (stored_dim // 2) for piece in pieces} == {0}
            assert sum(piece.size for piece in pieces if piece.owned) == sum(
                piece.size for piece in as_it_is.pieces[rank] if piece.owned
            )
        assert (cut.sharers, cut.shares_evenly) == (as_it_is.sharers, as_it_is.shares_evenly)


def test_heads_that_are_aligned_lie_as_they_do() -> None:
    for tp_size in (1, 3, 4):
        same = head_cut(4, 16, tp_size, 1, stored_dim=16)
        assert same == head_cut(4, 16, tp_size, 1)


@pytest.mark.parametrize("tp_size", range(1, 9))
def test_all_local_widths_of_the_published_shapes_are_aligned(tp_size: int) -> None:
    for vocabulary in (151_665, 151_669):
        assert padded_slice_size(vocabulary, tp_size, PAD) % PAD == 0
    with torch.device("meta"):
        model = small_model(
            vocab_size=15_165, hidden_size=48, num_attention_heads=24, num_key_value_heads=8, head_dim=170,
            intermediate_size=4864,
        )  # fmt: skip
    slice_map = build_slice_map(model, plan_for(model), tp_size, PAD)
    for name in slice_map.names:
        for rank in range(tp_size):
            assert all(extent % PAD == 0 for extent in slice_map.local_shape(name, rank)), (name, rank)


@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 3), (2, 2), (5, 2), (8, 1)])
def test_every_parameter_and_its_initial_values(tp_size: int, dp_size: int) -> None:
    """One owner each, in every layout, and the values that an unpadded slice draws, bit for bit."""
    model = small_model(torch.float32, **BIASES)
    whole_map = build_slice_map(model, plan_for(model), 1)
    draw: dict[str, Any] = {"std_of": lambda name: None if "norm" in name else 0.5, "seed": 3}
    whole = {name: torch.empty(whole_map.shape(name)) for name in whole_map.names}
    initialise_parameters(whole, whole_map, 0, **draw)
    slice_map = build_slice_map(model, plan_for(model), tp_size, PAD)
    slice_map = slice_map.with_data_parallel(dp_size, sharded=True)
    for name in slice_map.names:
        check_map(slice_map, name)
    for rank in range(slice_map.world_size):
        local = {name: torch.full(slice_map.local_shape(name, rank), 9.0) for name in slice_map.names}
        initialise_parameters(local, slice_map, rank, **draw)
        for name, values in local.items():
            for box in slice_map.rectangles(name, rank):
                assert torch.equal(values[box.local_index], whole[name][box.unsharded_index]), name
            assert not padding_of(values, slice_map, name, rank).any()


# ---------------------------------------------------------------------------------------------------
# What is computed


def split_gradients(
    model: Any, group: SimulatedTPGroup, tokens: Tensor, **options: Any
) -> tuple[float, dict[str, Tensor], Tensor]:
    shard_tensor_parallel(model, group, pad_to=PAD, **options)
    loss = loss_of(model, tokens)
    loss.backward()
    state = model.tensor_parallel
    state.sum_partial_gradients({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        for values in (parameter, parameter.grad):
            padding = padding_of(values, state.slice_map, name, group.rank)
            assert torch.count_nonzero(padding) == 0, f"{name}: padding"
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    return loss.item(), gather_state_dict(model, gradients=True), logits


def check(tp_size: int, changes: dict[str, Any], **options: Any) -> None:
    """Against the unsharded model, which knows nothing of padding."""
    tokens = random_tokens()
    whole = small_model(**changes)
    expected = loss_of(whole, tokens)
    expected.backward()
    with torch.no_grad():
        logits = whole(input_ids=tokens[:, :-1]).logits
    models = [small_model(**changes) for _ in range(tp_size)]
    ranks = simulate(
        SimulatedTPGroup.create(tp_size),
        lambda group: split_gradients(models[group.rank], group, tokens, **options),
    )
    for loss, gradients, own_logits in ranks:
        assert abs(loss - expected.item()) <= 1e-10 * abs(expected.item())
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None and gradients[name].shape == parameter.shape
            assert relative_error(gradients[name], parameter.grad) <= 1e-10, name
        assert relative_error(own_logits, logits) <= 1e-10


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("tp_size", "changes"),
    [
        (1, SWITCHES),
        (1, BIASES),
        (2, {**SWITCHES, **BIASES}),
        (4, {**BIASES, "attn_implementation": "eager"}),
        (8, {**SWITCHES, "num_key_value_heads": 2}),  # heads that four ranks share
        (3, {**SWITCHES, **BIASES}),  # unequal shares of heads
        (5, {**BIASES, "num_key_value_heads": 2, "head_dim": 10}),
    ],
)
def test_loss_gradients_and_logits(tp_size: int, changes: dict[str, Any], sequence_parallel: bool) -> None:
    for chunk in (0, 5):
        check(tp_size, changes, sequence_parallel=sequence_parallel, loss_chunk_tokens=chunk)


def test_the_forms_that_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation in fewer passes, on the CPU, which has no kernel for the fused norm."""
    monkeypatch.setattr(decoder, "saves_traffic", lambda x: True)
    monkeypatch.setattr(decoder, "_HAS_FUSED_NORM", False)
    check(2, {**SWITCHES, **BIASES})


@pytest.mark.parametrize(("tp_size", "switches"), [(1, SWITCHES), (2, {}), (3, SWITCHES)])
def test_each_document_alone(tp_size: int, switches: dict[str, Any]) -> None:
    tokens, spans = batch_and_spans()
    whole = small_model(**switches)
    expected = together(whole, tokens, spans)
    expected.backward()
    models = [small_model(**switches) for _ in range(tp_size)]

    def work(group: SimulatedTPGroup) -> tuple[float, dict[str, Tensor]]:
        model: Any = shard_tensor_parallel(models[group.rank], group, sequence_parallel=True, pad_to=PAD)
        loss = together(model, tokens, spans)
        loss.backward()
        model.tensor_parallel.sum_partial_gradients({n: p.grad for n, p in model.named_parameters()})
        return loss.item(), gather_state_dict(model, gradients=True)

    for loss, actual in simulate(SimulatedTPGroup.create(tp_size), work):
        assert abs(loss - expected.item()) <= 1e-10 * expected.item()
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None and relative_error(actual[name], parameter.grad) <= 1e-10, name


@pytest.mark.parametrize("tp_size", [1, 3])
def test_padded_prompts_and_the_cache(tp_size: int) -> None:
    """And tables that were made for heads as they are do not stay."""
    ids = random_tokens(length=13)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    models = [small_model(**SWITCHES).eval() for _ in range(tp_size)]
    expected = decoded(models[0], ids, mask)

    def work(group: SimulatedTPGroup) -> list[Tensor]:
        model: Any = shard_tensor_parallel(models[group.rank], group, pad_to=PAD)
        with torch.no_grad():
            model(input_ids=ids)
        return decoded(model, ids, mask)

    with torch.no_grad():
        models[0](input_ids=ids)
    for logits in simulate(SimulatedTPGroup.create(tp_size), work):
        for one, whole in zip(logits, expected, strict=True):
            torch.testing.assert_close(one[0], whole[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(one[1, -1], whole[1, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("key_value", "size"), [(4, 2), (2, 8), (4, 3)])
def test_collectives_are_as_many_and_those_of_the_formula(
    key_value: int, size: int, sequence_parallel: bool
) -> None:
    model = small_model(num_key_value_heads=key_value, qk_norm=True)
    ids = random_tokens()
    plain, _ = measure_simulated(copy.deepcopy(model), ids, size, sequence_parallel=sequence_parallel)
    ranks, slice_map = measure_simulated(model, ids, size, sequence_parallel=sequence_parallel, pad_to=PAD)
    outline = ModelOutline.of(model, PAD)
    cost = tensor_parallel_cost(
        outline, model, size, (ids.shape[0], ids.shape[1]), 8, sequence_parallel=sequence_parallel
    )
    assert all(measured.step == cost.step for measured in ranks)
    calls = [{kind: count for kind, (count, _) in one.step.items()} for one in (plain[0], ranks[0])]
    assert calls[0] == calls[1]
    stored = [
        sum(torch.Size(slice_map.local_shape(name, rank)).numel() for name in slice_map.names)
        for rank in range(size)
    ]
    assert cost.parameters_per_rank == max(stored)


# ---------------------------------------------------------------------------------------------------
# Who sees it


def test_one_rank_too_stores_padding_and_shows_none() -> None:
    model: Any = small_model(torch.float32)
    whole = copy.deepcopy(model).state_dict()
    shard_tensor_parallel(model, pad_to=PAD)
    assert model.blocks[0].attn.q_proj.weight.shape == (64, 50)
    assert model.blocks[0].attn.o_proj.weight.shape == (50, 64)
    assert model.lm_head.weight.shape == (136, 50)
    assert model.config.head_dim == 6 and model.config.vocab_size == 131
    for name, values in unsharded_state_dict(model).items():
        assert torch.equal(values, whole[name]), name
    with pytest.raises(ConfigError, match="would write padded weights"):
        model.save_pretrained("nowhere")
    for ids in (torch.tensor([[131]]), torch.tensor([[-1]])):
        with pytest.raises(IndexError, match="outside the vocabulary of 131"):
            model(input_ids=ids)
    drawn = model.eval().generate(random_tokens(length=4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    plain: Any = small_model(torch.float32).eval()
    expected = plain.generate(random_tokens(length=4), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(drawn, expected)


def test_where_nothing_is_asked_or_missing_nothing_changes() -> None:
    """Standalone splits are not padded by themselves, and aligned widths stay what they are."""
    changes = {"head_dim": 8, "vocab_size": 128, "intermediate_size": 96}
    cases: list[tuple[int, dict[str, Any]]] = [(1, changes), (1, {}), (PAD, changes)]
    for pad_to, shape in cases:
        model: Any = small_model(torch.float32, **shape)
        expected = copy.deepcopy(model)
        shard_tensor_parallel(model, pad_to=pad_to)
        shard_tensor_parallel(expected)
        assert all(model.tensor_parallel.slice_map.cut(name) is None for name, _ in model.named_parameters())
        assert torch.equal(loss_of(model, random_tokens(128)), loss_of(expected, random_tokens(128)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_transformers_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot be stored padded: leave pad_to out"):
        shard_tensor_parallel(build(kind), pad_to=PAD)


@pytest.mark.parametrize("pad_to", [0, -8, 7])
def test_halves_that_cannot_be_padded_are_refused(pad_to: int) -> None:
    with pytest.raises(ConfigError, match=f"pad_to {pad_to}: give an even number"):
        shard_tensor_parallel(small_model(), pad_to=pad_to)


def test_what_is_said_of_it() -> None:
    with torch.device("meta"):
        model = small_model(head_dim=170, vocab_size=128, intermediate_size=96)
    heads = HeadCounts.from_config(model.config, PAD)
    text = padding_text(build_slice_map(model, plan_for(model), 2, PAD), heads)
    assert text is not None
    assert text.startswith("to a multiple of 8: heads of 170 stored as 176, 3.")
    assert (
        padding_text(build_slice_map(model, plan_for(model), 2), HeadCounts.from_config(model.config)) is None
    )
