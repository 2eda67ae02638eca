"""Text from a split model: the likeliest tokens, on any number of ranks, without a trace in training."""

from typing import Any

import torch

from argonne.testing.distributed import run_ranks
from argonne.training.generation import PROMPT, generate_text
from tests.training.small_run import trained_model


class Characters:
    """A tokenizer of single characters; id 0 ends a document."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) % 131 for character in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(index) for index in ids if index or not skip_special_tokens)


def likeliest(model: Any, ids: list[int], count: int) -> list[int]:
    """The plain loop: the whole text again for each token, and no cache."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == Characters.eos_token_id:
                break
    return ids


def test_the_likeliest_tokens_are_taken() -> None:
    trained, tokenizer = trained_model(), Characters()
    text = generate_text(trained, tokenizer, max_new_tokens=12, temperature=0.0)
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert text == tokenizer.decode(likeliest(trained.model, prompt, 12), skip_special_tokens=True)
    assert text.startswith(PROMPT)


def test_an_empty_prompt_is_the_beginning_of_a_document() -> None:
    trained, tokenizer = trained_model(), Characters()
    text = generate_text(trained, tokenizer, prompt="", max_new_tokens=3, temperature=0.0)
    assert text == tokenizer.decode(likeliest(trained.model, [0], 3), skip_special_tokens=True)


def test_training_does_not_notice() -> None:
    trained = trained_model()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    texts = [generate_text(trained, Characters(), max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), state) and trained.model.training
    assert all(parameter.grad is None for parameter in trained.model.parameters())


def text_rank(rank: int, world_size: int, temperature: float) -> str:
    trained = trained_model(rank, world_size)
    tokenizer = Characters()  # no control group here: every rank has it
    return generate_text(trained, tokenizer, max_new_tokens=12, temperature=temperature, seed=4)


def test_split_over_two_ranks_it_is_the_same_text() -> None:
    for temperature in (0.0, 0.8):
        alone = generate_text(
            trained_model(), Characters(), max_new_tokens=12, temperature=temperature, seed=4
        )
        assert run_ranks(text_rank, 2, temperature) == [alone, alone]
