"""The model against transformers' Llama: logits, loss, every gradient, optimizer steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from argonne.testing.hf_reference import llama_gradients, llama_parameters, widen
from argonne.testing.models import relative_error
from model import causal_lm_loss, rotary_frequencies, rotary_tables
from tests.model.model_pairs import (
    VARIANTS,
    assert_same_gradients,
    gradients,
    make_config,
    make_pair,
    make_tokens,
)

# ----------------------------------------------------------------------------------------------------------
# Agreement with Llama


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_llamas(variant: str, attention: str) -> None:
    config = make_config(**VARIANTS[variant])
    model, llama = make_pair(config, attention)
    tokens = make_tokens(config)
    ours, theirs = model(tokens, labels=tokens), llama(tokens, labels=tokens)
    assert relative_error(ours.logits, theirs.logits) < 1e-5
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), llama_gradients(model, llama), 1e-5)


@pytest.mark.parametrize("variant", ["tied", "narrow-q-untied", "biases"])
def test_float64_agrees_far_below_float32_rounding(variant: str) -> None:
    config = make_config(**VARIANTS[variant])
    model, llama = make_pair(config)
    model, llama = model.double(), widen(llama)
    tokens = make_tokens(config)
    ours, theirs = model(tokens, labels=tokens), llama(tokens, labels=tokens)
    assert ours.loss.dtype == torch.float64
    assert relative_error(ours.logits, theirs.logits) < 1e-13
    assert abs(ours.loss.item() - theirs.loss.item()) < 1e-13
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), llama_gradients(model, llama), 1e-12)


def test_float64_eager_equals_float64_sdpa() -> None:
    config = make_config()
    model = make_pair(config)[0].double()
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    tokens = make_tokens(config)
    for each in (model, other):
        each(tokens, labels=tokens).loss.backward()
    assert_same_gradients(gradients(other), gradients(model), 1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_mask_agrees_with_llama(attention: str, side: str) -> None:
    config = make_config()
    model, llama = make_pair(config, attention)
    tokens = make_tokens(config)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 4, 9)):
        if padding:
            mask[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    if side == "left":
        inputs["position_ids"] = position_ids
    ours, theirs = model(tokens, **inputs), llama(tokens, **inputs)
    real = mask.bool()
    assert relative_error(ours.logits[real], theirs.logits[real]) < 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), llama_gradients(model, llama), 1e-5)
    unmasked = model(tokens).logits
    assert (relative_error(unmasked[real], ours.logits[real]) > 1e-2) == (side == "left")


@pytest.mark.parametrize("tie", [True, False])
def test_ten_adamw_steps_agree_with_llama(tie: bool) -> None:
    config = make_config(tie_word_embeddings=tie)
    model, llama = make_pair(config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses: list[list[float]] = []
    for each in (model, llama):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3, weight_decay=0.1)
        losses.append([])
        for step in range(10):
            tokens = make_tokens(config, seed=step)
            loss = each(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=3e-5)
    pairs = zip(model.named_parameters(), llama_parameters(model, llama).values(), before, strict=True)
    for (name, parameter), reference, start in pairs:
        assert relative_error(parameter, reference) < 2e-3, name
        assert relative_error(parameter, start) > 3e-3, f"{name} hardly moved"


def test_positions_beyond_max_position_embeddings_work() -> None:
    config = make_config(max_position_embeddings=8)
    model, llama = make_pair(config)
    tokens = make_tokens(config, seq_len=100)
    assert relative_error(model(tokens).logits, llama(tokens).logits) < 1e-5
    shifted = torch.arange(5000, 5100)[None]
    ours, theirs = model(tokens, position_ids=shifted).logits, llama(tokens, position_ids=shifted).logits
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_and_masks_come_from_input_ids_not_from_the_embedding(attention: str) -> None:
    """With sequence parallelism the embedding returns a slice, and each attention gathers the whole."""
    config = make_config()
    model = make_pair(config, attention)[0]
    tokens = make_tokens(config, seq_len=12)
    expected = model(tokens[:, :6].repeat(1, 2)).logits[:, :6]
    embed = model.embed_tokens.forward
    model.embed_tokens.forward = lambda ids: embed(ids)[:, :6]
    for block in model.blocks:
        qkv, o_proj = block.attn.qkv, block.attn.o_proj.forward
        block.attn.qkv = lambda x, qkv=qkv: qkv(x.repeat(1, 2, 1))
        block.attn.o_proj.forward = lambda x, o_proj=o_proj: o_proj(x)[:, :6]
    assert relative_error(model(tokens).logits, expected) < 1e-6


def test_head_counts_are_read_from_the_attention_modules() -> None:
    """Half the heads with half the weights give the first half's share, as on one rank of two."""
    config = make_config()
    attention = make_pair(config)[0].blocks[0].attn
    x = torch.randn(2, 9, 60, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(rotary_frequencies(config), torch.arange(9)[None], x.dtype)
    whole = attention(x, tables)
    shares = []
    for rank in range(2):
        local = copy.deepcopy(attention)
        local.num_heads, local.num_kv_heads, local.num_key_value_groups = 3, 1, 3
        for name, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            projection = getattr(local, name)
            projection.weight = nn.Parameter(projection.weight.chunk(2, dim)[rank])
        shares.append(local(x, tables))
    assert relative_error(shares[0] + shares[1], whole) < 1e-6
    assert relative_error(shares[0], whole) > 0.1


# ----------------------------------------------------------------------------------------------------------
# Loss


def test_labels_are_shifted_once() -> None:
    config = make_config()
    model = make_pair(config)[0]
    tokens = make_tokens(config)
    output = model(tokens, labels=tokens)
    by_hand = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    twice = F.cross_entropy(output.logits[:, :-2].flatten(0, 1), tokens[:, 2:].flatten())
    assert output.loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert abs(output.loss.item() - twice.item()) > 1e-3
    shifted = model(tokens[:, :-1], shift_labels=tokens[:, 1:])
    assert shifted.loss.item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_loss_ignores_minus_100_and_counts_items_as_transformers_does() -> None:
    config = make_config()
    model, llama = make_pair(config)
    tokens = make_tokens(config)
    labels = tokens.clone()
    labels[:, :7] = -100
    for options in ({}, {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(11)}):
        ours = model(tokens, labels=labels, **options).loss
        assert ours.item() == pytest.approx(llama(tokens, labels=labels, **options).loss.item(), abs=1e-5)
    nothing = torch.full_like(labels, -100)
    assert model(tokens, labels=nothing).loss.isnan() and llama(tokens, labels=nothing).loss.isnan()
    assert model(tokens, labels=nothing, num_items_in_batch=1).loss.item() == 0.0


def test_loss_of_16_bit_logits_is_computed_in_float32() -> None:
    logits = (torch.randn(2, 9, 131, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    labels = make_tokens(make_config(), batch=2, seq_len=9)
    loss = causal_lm_loss(logits, labels, 131)
    expected = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="labels or shift_labels"):
        causal_lm_loss(logits, None, 131)
