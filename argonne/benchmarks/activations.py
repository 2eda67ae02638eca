"""Bytes that autograd keeps for the backward pass, exactly: every storage once, parameters left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor


class SavedBytes:
    """Storages kept for the backward pass, each once."""

    def __init__(self, model: nn.Module) -> None:
        self._left_out = {_storage(parameter) for parameter in model.parameters()}
        self._kept: dict[int, int] = {}
        self._alive: list[Tensor] = []

    @property
    def total(self) -> int:
        return sum(self._kept.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(local, AsyncCollectiveTensor):
            local = local.trigger_wait()
        storage = local.untyped_storage()
        if storage.data_ptr() not in self._left_out:
            self._kept[storage.data_ptr()] = storage.nbytes()
            self._alive.append(local)  # so that no later tensor takes the same address
        return tensor


def _storage(parameter: Tensor) -> int:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.untyped_storage().data_ptr()


def saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Kept after the forward pass with a loss on tokens (batch, seq_len + 1); the graph is then dropped."""
    counter = SavedBytes(model)
    with counter.counting():
        loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    del loss
    return counter.total


def saved_bytes_without_loss(model: nn.Module, inputs: Tensor) -> int:
    """As `saved_bytes`, of the logits alone, for a model whose own loss is not the one used."""
    counter = SavedBytes(model)
    with counter.counting():
        logits = model(input_ids=inputs, use_cache=False).logits
    del logits
    return counter.total
