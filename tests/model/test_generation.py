"""Generation, caches, packed sequences and the other outputs of the model, against transformers' Llama."""

from typing import Any

import pytest
import torch

from argonne.testing.models import relative_error
from tests.model.model_pairs import make_config, make_pair, make_tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_generation_with_and_without_cache_equals_llamas(attention: str) -> None:
    config = make_config()
    model, llama = make_pair(config, attention)
    prompt = make_tokens(config, seq_len=7)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (3, 27)
    assert len(set(cached[:, 7:].flatten().tolist())) > 5
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert torch.equal(cached, llama.generate(prompt, **options))
    assert torch.equal(cached, model.generate(prompt, cache_implementation="static", **options))


def test_cache_in_pieces_gives_the_logits_of_one_pass() -> None:
    config = make_config()
    model = make_pair(config)[0].eval()
    tokens = make_tokens(config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False)
        assert whole.past_key_values is None
        cache, pieces = None, []
        for piece in tokens.split([6, 1, 5, 7], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert relative_error(torch.cat(pieces, 1), whole.logits) < 1e-5
    assert model.train()(tokens).past_key_values is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_sequences_packed_by_position_ids_do_not_see_each_other(training: bool, attention: str) -> None:
    config = make_config()
    model = make_pair(config, attention)[0].train(training)
    tokens = make_tokens(config, seq_len=16)
    position_ids = torch.cat([torch.arange(7), torch.arange(9)])[None].expand(3, -1)
    packed = model(tokens, position_ids=position_ids).logits
    assert relative_error(packed[:, 7:], model(tokens[:, 7:]).logits) < 1e-5
    assert relative_error(packed[:, 7:], model(tokens).logits[:, 7:]) > 1e-2


def test_logits_to_keep_and_hidden_states() -> None:
    config = make_config()
    model, llama = make_pair(config)
    tokens = make_tokens(config)
    whole = model(tokens, output_hidden_states=True)
    reference = llama(tokens, output_hidden_states=True).hidden_states
    assert len(whole.hidden_states) == len(reference) == 3
    for ours, theirs in zip(whole.hidden_states, reference, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert relative_error(model(tokens, logits_to_keep=2).logits, whole.logits[:, -2:]) < 1e-6
    chosen = torch.tensor([3, 8])
    assert relative_error(model(tokens, logits_to_keep=chosen).logits, whole.logits[:, chosen]) < 1e-6
    by_embedding = model(inputs_embeds=model.embed_tokens(tokens))
    assert relative_error(by_embedding.logits, whole.logits) < 1e-6
    assert isinstance(model(tokens, return_dict=False), tuple)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
