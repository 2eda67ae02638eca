"""The reference of document attention: every document runs through the model alone, without any mask."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from model import ArgonneModel, causal_lm_loss

Spans = list[list[int]]
"""For each sequence of a batch the places where its documents begin, and its length."""


def ids_of(spans: Spans) -> Tensor:
    """``document_ids`` (batch, seq_len) of the documents."""
    return torch.tensor(
        [[d for d, (a, b) in enumerate(pairwise(bounds)) for _ in range(b - a)] for bounds in spans]
    )


def random_spans(batch: int, length: int, seed: int = 0) -> Spans:
    """Documents of all lengths from one token on, cut at random."""
    generator = torch.Generator().manual_seed(seed)
    spans = []
    for _ in range(batch):
        count = int(torch.randint(1, max(2, length // 12 + 2), (), generator=generator))
        places = (torch.randperm(length - 1, generator=generator)[: count - 1] + 1).sort().values.tolist()
        spans.append([0, *places, length])
    return spans


def alone(
    model: ArgonneModel, tokens: Tensor, spans: Spans, *, in_place: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients where each document of ``tokens`` (batch, seq_len + 1) is a sequence of its own.

    Its positions count from 0, or (``in_place``) from where it stands in the packed sequence.
    """
    model.zero_grad()
    config: Any = model.config
    pieces = [
        model(
            input_ids=tokens[row : row + 1, start:end],
            position_ids=torch.arange(start, end)[None] if in_place else None,
        ).logits
        for row, bounds in enumerate(spans)
        for start, end in pairwise(bounds)
    ]
    logits = torch.cat(pieces, dim=1)
    loss = causal_lm_loss(
        logits,  # capped already
        None,
        config.vocab_size,
        shift_labels=tokens[:, 1:].reshape(1, -1),
        z_loss_weight=config.z_loss_weight,
    )
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def together(model: Any, tokens: Tensor, spans: Spans) -> Tensor:
    """The training loop's loss of the same documents packed into sequences."""
    loss: Tensor = model(
        input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:], document_ids=ids_of(spans)
    ).loss
    return loss
