"""The largest number of bytes that a step's tensors take, counted tensor by tensor on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTensors(TorchDispatchMode):
    """While it is on, adds up the storages that operations return and that still live, after each operation.

    ``there``: tensors made before. Memory inside a kernel is not seen.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._note(there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.peak = max(self.peak, self._live())
        return result

    def _note(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)

    def _live(self) -> int:
        total = 0
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()  # asked each time: FSDP empties storages and fills them again
        return total
