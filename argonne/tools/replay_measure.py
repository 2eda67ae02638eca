"""What one document of a step does under the step's weights: its loss, and the norm of its gradient."""

from __future__ import annotations

from typing import Any

import torch

from argonne.ranks.replicas import forward_context, local_gradients
from argonne.tools.replay_result import MeasuredDocument
from argonne.tools.step_documents import StepDocument
from argonne.training.build import TrainedModel
from argonne.training.optimizer import GradientTotals
from data_stream import StepBatch

IGNORED = -100


def measure(
    trained: TrainedModel, batch: StepBatch, document: StepDocument, *, scale: float, tokenizer: Any
) -> MeasuredDocument:
    """Loss and gradient norm of one document; collective.

    With several data-parallel replicas all of them do the same document, so that the mean over the replicas
    is its gradient. ``scale``: the loss scale; ``tokenizer``: rank 0's, for the text.
    """
    parallel = trained.parallel
    trained.optimizer.zero_grad(set_to_none=True)
    context = forward_context(parallel, trained.dtype, sharded=trained.fsdp)
    total = torch.zeros((), dtype=torch.float64)
    every = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
    for sample in dict.fromkeys(piece.sample for piece in document.pieces):
        tokens = batch.tokens[sample : sample + 1].to(parallel.device).long()
        targets = torch.full_like(tokens[:, 1:], IGNORED)
        for _, begin, end in (piece for piece in document.pieces if piece.sample == sample):
            targets[:, begin:end] = tokens[:, begin + 1 : end + 1]
        inputs, within = tokens[:, :-1].contiguous(), {}
        if batch.document_ids is not None:
            within["document_ids"] = batch.document_ids[sample : sample + 1].to(parallel.device)
        with context():
            mean = trained.wrapped(input_ids=inputs, shift_labels=targets, **within).loss
        count = int((targets != IGNORED).sum())
        (mean * (count / every) * scale).backward()
        total += mean.detach().double().cpu() * count
    gradients = local_gradients(trained.model)
    trained.tensor_parallel.sum_partial_gradients(gradients)
    sums = GradientTotals(trained.slice_map, parallel.rank, parallel.world_group)
    norm = sums.reduce(gradients, loss_share=torch.zeros((), device=parallel.device), scale=scale).read()
    trained.optimizer.zero_grad(set_to_none=True)
    return MeasuredDocument(
        document=document,
        loss=float(total) / document.tokens,
        grad_norm=norm.grad_norm,
        text=_text(tokenizer, batch, document),
    )


def _text(tokenizer: Any, batch: StepBatch, document: StepDocument) -> str:
    if tokenizer is None:
        return ""
    ids = [
        token for sample, begin, end in document.pieces for token in batch.tokens[sample, begin:end].tolist()
    ]
    return str(tokenizer.decode(ids))
