"""Document attention: packed documents give the loss and gradients of each document alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from argonne.testing.models import random_tokens, relative_error, small_model
from model import (
    _attention_in_runs,
    document_attention,
    document_block_mask,
    document_starts,
    eager_attention,
    sdpa_attention,
)
from tests.model.documents_alone import alone, ids_of, random_spans, together
from tests.model.family_reference import SWITCHES


@pytest.mark.parametrize("switches", [{}, SWITCHES], ids=["argonne-2.0", "every-switch"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_document_is_as_if_alone(
    dtype: torch.dtype, tolerance: float, attention: str, switches: dict[str, Any]
) -> None:
    # The rotary tables are float32 in a float64 model too: angles of other positions are equal to 1e-8.
    in_place = dtype is torch.float64
    for seed, length in ((0, 14), (2, 150)):
        tokens, spans = random_tokens(batch=3, length=length + 1), random_spans(3, length, seed)
        model = small_model(dtype, **switches)
        model.set_attn_implementation(attention)
        expected, gradients = alone(model, tokens, spans, in_place=in_place)
        loss = together(model, tokens, spans)
        loss.backward()
        assert abs(loss.item() - expected) <= tolerance * expected
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert relative_error(parameter.grad, gradients[name]) <= tolerance, (name, length)


def test_what_comes_before_a_document_does_not_reach_it() -> None:
    tokens, spans = random_tokens(batch=1, length=30), [[0, 11, 12, 30]]
    model = small_model().eval()
    logits = model(input_ids=tokens, document_ids=ids_of(spans)).logits
    changed = torch.cat((random_tokens(batch=1, length=12, seed=9), tokens[:, 12:]), dim=1)
    again = model(input_ids=changed, document_ids=ids_of(spans)).logits
    assert torch.equal(logits[:, 12:], again[:, 12:])
    assert not torch.equal(logits[:, :11], again[:, :11])
    assert not torch.allclose(logits[:, 12:], model(input_ids=tokens).logits[:, 12:])


def test_one_document_is_plain_causal_attention() -> None:
    tokens = random_tokens(length=20)
    model = small_model(**SWITCHES)
    ids = torch.full_like(tokens, 7)
    assert torch.equal(
        model(input_ids=tokens, document_ids=ids).logits, model(input_ids=tokens, use_cache=False).logits
    )


def test_a_run_of_equal_ids_is_a_document() -> None:
    starts = document_starts(torch.tensor([[3, 3, 1, 1, 1, 3], [0, 1, 2, 3, 4, 5]]))
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 4, 5]]


def attention_inputs(length: int, heads: int = 4, shared: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, heads, length, 8, generator=generator),
        torch.randn(2, shared, length, 8, generator=generator),
        torch.randn(2, shared, length, 8, generator=generator),
    )


def dense_mask(starts: Tensor, window: int | None) -> Tensor:
    places = torch.arange(starts.shape[1])
    seen = (places <= places[:, None]) & (places >= starts[..., None])
    return seen if window is None else seen & (places >= places[:, None] - window)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # a peer, not a run's way
@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize("length", [1, 127, 128, 700])
def test_all_paths_of_attention_agree(length: int, window: int | None) -> None:
    query, key, value = attention_inputs(length)
    starts = document_starts(ids_of(random_spans(2, length, seed=length)))
    seen = dense_mask(starts, window)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, enable_gqa=True
    )
    for attend in (sdpa_attention, eager_attention):
        arguments = (attend, query, key, value, starts, window, 2, 8**-0.5)
        assert torch.allclose(document_attention(*arguments), expected, atol=2e-6)
        assert torch.allclose(_attention_in_runs(*arguments), expected, atol=2e-6)
    mask = document_block_mask(starts, window)
    flexible = document_attention(sdpa_attention, query, key, value, mask, window, 2, 8**-0.5)
    assert torch.allclose(flexible, expected, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 50, 300])
@pytest.mark.parametrize("length", [1, 128, 129, 1000])
def test_block_mask_covers_what_is_seen(length: int, window: int | None) -> None:
    """Blocks that it leaves out hold nothing seen, those it calls full nothing hidden."""
    spans = [[0, *range(90, length, 137), length], [0, length]] if length > 90 else [[0, length]] * 2
    starts = document_starts(ids_of(spans))
    mask = document_block_mask(starts, window)
    blocks = -(-length // 128)
    seen = torch.zeros(2, blocks * 128, blocks * 128, dtype=torch.bool)
    seen[:, :length, :length] = dense_mask(starts, window)
    tiles = seen.view(2, blocks, 128, blocks, 128).transpose(2, 3)
    kept = mask.to_dense()[:, 0].bool()
    full = torch.zeros_like(kept)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for row in range(2):
        for block in range(blocks):
            count = int(mask.full_kv_num_blocks[row, 0, block])
            full[row, block, mask.full_kv_indices[row, 0, block, :count].long()] = True
    assert not (tiles.any(-1).any(-1) & ~kept).any()
    seen[:, length:] = True  # rows past the end do not count
    assert tiles.all(-1).all(-1)[full].all()
    if length == 1000 and window in (None, 300):
        assert full.any() and not kept.tril().equal(torch.ones_like(kept).tril())


def test_flex_attention_is_the_librarys_own() -> None:
    """The mask made from bounds is what create_block_mask makes of the same rule."""
    from torch.nn.attention.flex_attention import create_block_mask

    starts = document_starts(ids_of(random_spans(2, 300, seed=3)))

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= starts[batch, query])

    query, key, value = attention_inputs(300, heads=2)
    theirs = create_block_mask(rule, 2, None, 300, 300, device="cpu")
    ours = document_block_mask(starts)
    assert torch.equal(
        flex_attention(query, key, value, block_mask=theirs),
        flex_attention(query, key, value, block_mask=ours),
    )


def test_contradictions_are_refused() -> None:
    model, tokens = small_model().eval(), random_tokens()
    ids = torch.zeros_like(tokens)
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=tokens, document_ids=ids, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="cache"):
        model(input_ids=tokens, document_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match=r"shape \(2, 14\)"):
        model(input_ids=tokens, document_ids=ids[:, 1:])
    assert model(input_ids=tokens, document_ids=ids).past_key_values is None
