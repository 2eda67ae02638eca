"""The attention of an audit's plain block is that of the model, forward and backward."""

from functools import partial
from typing import Any

import pytest
import torch

from argonne.testing.models import small_model
from argonne.verification import plain_blocks
from argonne.verification.plain_blocks import plain_attention, wider_dtype
from model import document_starts, rotary_tables

LENGTH = 14


@pytest.mark.parametrize("run", [4, 256])
@pytest.mark.parametrize("within_documents", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_spelled_out(
    run: int, within_documents: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_blocks, "RUN", run)
    switches: dict[str, Any] = {"qk_norm": True, "v_norm": True, "attention_bias": True}
    local: dict[str, Any] = {"interleaved_local_attention": window is not None}
    local["local_attention_window"] = window
    block: Any = small_model(**switches, **local).blocks[1]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, LENGTH, 50, generator=generator, dtype=torch.float64)
    upstream = torch.randn(2, LENGTH, 50, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0] * 5 + [1] * 9, [0] * 14])
    starts = document_starts(ids) if within_documents else None
    frequencies = small_model(**local).rotary_frequencies
    rotary = rotary_tables(frequencies, torch.arange(LENGTH)[None], torch.float64)
    results = []
    for plain in (False, True):
        if plain:
            block.attn.forward = partial(plain_attention, block.attn)
        entered = hidden.clone().requires_grad_()
        output = block(entered, rotary, documents=starts)
        results.append([output, *torch.autograd.grad(output, [entered, *block.parameters()], upstream)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_truth_is_wider_than_the_run() -> None:
    assert wider_dtype(torch.bfloat16) == wider_dtype(torch.float16) == torch.float32
    assert wider_dtype(torch.float32) == torch.float64
