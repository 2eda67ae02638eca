"""Degrees that do not divide the heads: unequal shares of query heads, copies of key/value heads."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.tp.costs import ModelOutline
from argonne.tp.head_cuts import head_cut, head_range
from argonne.tp.plan import HeadCounts
from argonne.tp.slices import SliceMap
from argonne.tp.uneven_heads import HeadCopies
from argonne.verification.simulate import measure, measure_simulated, simulate
from model import ArgonneModel
from tests.model.documents_alone import alone
from tests.model.family_reference import SWITCHES
from tests.tp.hf_models import KINDS, VOCAB, build, check_gradients, gradients_of, unsharded_loss, widen
from tests.tp.test_documents import batch_and_spans, split_gradients
from tests.tp.test_family import check
from tests.tp.test_slices import check_cut
from tp_shard import (
    SimulatedTPGroup,
    gather_state_dict,
    head_imbalance,
    shard_tensor_parallel,
    tensor_parallel_cost,
    work_imbalance,
)


def test_shares_differ_by_one_head_and_respect_groups() -> None:
    assert [len(head_range(24, 7, rank)) for rank in range(7)] == [3, 3, 4, 3, 4, 3, 4]
    heads = HeadCounts(query_heads=24, key_value_heads=8, head_dim=2)
    assert [heads.grouped(7, rank) for rank in range(7)] == [
        (3,), (3,), (3, 1), (2, 1), (2, 2), (1, 2), (1, 3)
    ]  # fmt: skip
    twelve = HeadCounts(query_heads=12, key_value_heads=4, head_dim=2)
    assert [twelve.grouped(8, rank) for rank in range(8)] == 4 * [(1,), (2,)]
    for query, tp_size in ((24, 5), (7, 3), (6, 6), (9, 8)):
        shares = [head_range(query, tp_size, rank) for rank in range(tp_size)]
        assert [head for share in shares for head in share] == list(range(query))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("query", "key_value", "tp_size"), [(24, 8, 7), (24, 8, 3), (12, 4, 8), (7, 1, 2)])
def test_each_rank_holds_the_heads_that_its_queries_need(query: int, key_value: int, tp_size: int) -> None:
    cut = head_cut(key_value, 2, tp_size, 0, query_heads=query)
    check_cut((2 * key_value, 3), cut, tp_size)
    check_cut((2 * query, 3), head_cut(query, 2, tp_size, 0), tp_size)
    for rank in range(tp_size):
        needed = {head // (query // key_value) for head in head_range(query, tp_size, rank)}
        held = {row // 2 for p in cut.pieces[rank] for row in range(p.start, p.start + p.size)}
        assert held == needed


def test_even_sharing_is_known_from_uneven() -> None:
    for query, key_value, tp_size, evenly in (
        (6, 2, 6, True), (12, 4, 8, True), (7, 1, 2, True), (24, 8, 8, True),
        (24, 8, 12, False), (24, 8, 7, False),
    ):  # fmt: skip
        assert head_cut(key_value, 2, tp_size, 0, query_heads=query).shares_evenly == evenly


def test_parts_that_are_held_together_are_the_same_elements() -> None:
    shape = (16, 3)
    for dp_size in (1, 2, 3):
        cut = head_cut(8, 2, 7, 0, query_heads=24)
        slice_map = SliceMap({"k": (shape, cut)}, tp_size=7, dp_size=dp_size, dp_sharded=True)
        counted = torch.zeros(shape, dtype=torch.int64)
        for rank in range(slice_map.world_size):
            for box in slice_map.rectangles("k", rank):
                counted[box.unsharded_index] += 1
        shared = torch.zeros_like(counted)
        for part in slice_map.copies("k"):
            boxes = list(part.values())
            assert len({(box.start, box.size) for box in boxes}) == 1
            assert sum(box.owned for box in boxes) == 1
            shared[boxes[0].unsharded_index] += len(boxes)
        assert torch.equal(shared, torch.where(counted > 1, counted, 0))


def test_each_query_head_meets_its_own_key_head() -> None:
    keys = torch.arange(6.0).view(1, 1, 6)  # three heads of 2
    assert HeadCopies((1, 3, 2), 2)(keys).view(-1, 2)[:, 0].tolist() == [0, 2, 2, 2, 4, 4]
    assert HeadCopies((2, 4), 3)(keys).view(-1, 3)[:, 0].tolist() == [0, 3, 3]  # in groups of two


@pytest.mark.parametrize(
    ("tp_size", "sequence_parallel", "key_value_heads"), [(3, False, 4), (5, True, 4), (7, False, 2)]
)
def test_every_switch_at_uneven_degrees(tp_size: int, sequence_parallel: bool, key_value_heads: int) -> None:
    check(tp_size, sequence_parallel, {**SWITCHES, "num_key_value_heads": key_value_heads})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_heads_and_degrees() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    for _ in range(60):
        key_value = generator.randint(1, 5)
        query = key_value * generator.randint(1, 6)
        switches = {key: value for key, value in SWITCHES.items() if generator.random() < 0.5}
        changes = {
            "local_attention_window": 3,
            "num_attention_heads": query,
            "num_key_value_heads": key_value,
            "head_dim": 2 * generator.randint(1, 4),
            "attention_bias": generator.random() < 0.5,
            "attn_implementation": generator.choice(["sdpa", "eager"]),
            **switches,
        }
        tp_size, split = generator.randint(1, min(query, 9)), generator.random() < 0.5
        print(tp_size, split, changes)
        check(tp_size, split, changes, length=generator.randint(3, 20))


_HF = [("llama", 3, True), ("qwen3", 5, False), ("gpt2", 3, False)]
_ALL_HF = [(kind, size, split) for kind in KINDS for size in (3, 5, 6, 7) for split in (False, True)]
_ALL_HF += [("gpt2", size, False) for size in (5, 7)]


@pytest.mark.parametrize(
    ("kind", "size", "sequence_parallel"),
    [*_HF, *(pytest.param(*case, marks=pytest.mark.slow) for case in _ALL_HF if case not in _HF)],
)
def test_models_of_transformers(kind: str, size: int, sequence_parallel: bool) -> None:
    ids = random_tokens(VOCAB, length=13)
    reference = widen(build(kind))
    loss = unsharded_loss(reference, ids)
    loss.backward()
    copies = [widen(build(kind)) for _ in range(size)]

    def work(group: SimulatedTPGroup) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = shard_tensor_parallel(copies[group.rank], group, sequence_parallel=sequence_parallel)
        own = model(input_ids=ids, labels=ids, use_cache=False).loss
        own.backward()
        model.tensor_parallel.sum_partial_gradients(gradients_of(model))
        return own.detach(), gather_state_dict(model, gradients=True)

    for own, gradients in simulate(SimulatedTPGroup.create(size), work):
        torch.testing.assert_close(own, loss.detach(), rtol=1e-12, atol=0)
        check_gradients(gradients, reference)


@pytest.mark.parametrize("switches", [{}, SWITCHES], ids=["argonne-2.0", "every-switch"])
def test_each_document_alone(switches: dict[str, Any]) -> None:
    tokens, spans = batch_and_spans()
    expected, gradients = alone(small_model(torch.float32, **switches), tokens, spans)
    models = [small_model(torch.float32, **switches) for _ in range(3)]
    for loss, actual in simulate(
        SimulatedTPGroup.create(3), lambda group: split_gradients(models[group.rank], group, True)
    ):
        assert abs(loss - expected) <= 1e-5 * expected
        for name, gradient in gradients.items():
            assert relative_error(actual[name], gradient) <= 5e-5, name  # 4e-6 was seen


def decoded(model: ArgonneModel, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of a padded prompt, then of one token at a time through the cache."""
    with torch.no_grad():
        output = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        logits = [output.logits]
        for place in range(8, ids.shape[1]):
            output = model(
                input_ids=ids[:, place : place + 1],
                attention_mask=mask[:, : place + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            logits.append(output.logits)
    return logits


@pytest.mark.parametrize("switches", [{}, SWITCHES], ids=["argonne-2.0", "every-switch"])
def test_padded_prompts_and_the_cache(switches: dict[str, Any]) -> None:
    ids = random_tokens(length=13)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = decoded(small_model(**switches).eval(), ids, mask)
    models = [small_model(**switches).eval() for _ in range(5)]

    def work(group: SimulatedTPGroup) -> list[Tensor]:
        model: Any = shard_tensor_parallel(models[group.rank], group)
        return decoded(model, ids, mask)

    for logits in simulate(SimulatedTPGroup.create(5), work):
        for one, whole in zip(logits, expected, strict=True):
            torch.testing.assert_close(one[0], whole[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(one[1, -1], whole[1, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("query", "key_value", "size"), [(24, 8, 7), (24, 8, 5), (12, 4, 8)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_are_those_of_the_formula(
    query: int, key_value: int, size: int, sequence_parallel: bool
) -> None:
    """And copies have equal gradients, to the last bit."""
    model = small_model(num_attention_heads=query, num_key_value_heads=key_value, head_dim=2, qk_norm=True)
    ids = random_tokens()
    reference = measure(copy.deepcopy(model), ids)
    ranks, slice_map = measure_simulated(model, ids, size, sequence_parallel=sequence_parallel)
    cost = tensor_parallel_cost(
        ModelOutline.of(model),
        model,
        size,
        (ids.shape[0], ids.shape[1]),
        8,
        sequence_parallel=sequence_parallel,
    )
    for rank, measured in enumerate(ranks):
        assert measured.step == cost.step
        for name in slice_map.copied:
            for part in slice_map.copies(name):
                if rank in part:
                    first = next(iter(part))
                    ours = measured.gradients[name][part[rank].local_index]
                    assert torch.equal(ours, ranks[first].gradients[name][part[first].local_index]), name
        for name, gradient in reference.gradients.items():
            for box in slice_map.rectangles(name, rank):
                part_of = gradient[box.unsharded_index]
                assert relative_error(measured.gradients[name][box.local_index], part_of) < 1e-10, name


def test_what_the_imbalance_costs() -> None:
    assert head_imbalance(24, 8) == 1.0
    assert head_imbalance(24, 7) == pytest.approx(4 * 7 / 24)
    with torch.device("meta"):
        model = small_model(num_attention_heads=24, num_key_value_heads=8)
    outline = ModelOutline.of(model)
    assert work_imbalance(outline, model, 8, 64) == work_imbalance(outline, model, 2, 64) == 1.0
    one, two = (work_imbalance(outline, model, 7, length) for length in (64, 1 << 20))
    assert 1.0 < one < two < head_imbalance(24, 7) + 1e-9
