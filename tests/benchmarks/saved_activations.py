"""What autograd keeps of a forward pass, in bytes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], Any], models: Iterable[nn.Module]) -> int:
    """Bytes of the storages kept for the backward pass, each counted once, parameters of ``models`` apart."""
    weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
