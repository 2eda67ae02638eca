"""A rank's slices copied to host memory, so that they can be written while training goes on.

The memory is taken once and used again by every save, and pinned where the slices come from a GPU.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping

import torch

from argonne.checkpoint.adam import ADAM_KEYS
from argonne.checkpoint.contents import Adam
from argonne.checkpoint.shared_memory import SharedMemory
from argonne.errors import DeviceError
from argonne.tp.slices import SliceMap

_ALIGNMENT = 64
Moments = dict[str, dict[str, torch.Tensor]]


def _tensors(slice_map: SliceMap, rank: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, key and local shape of what a rank copies: the tensors of which it owns a part."""
    for name in slice_map.names:
        if slice_map.owned(name, rank):
            for key in ("param", *ADAM_KEYS):
                yield name, key, slice_map.local_shape(name, rank)


def _padded(shape: tuple[int, ...]) -> int:
    return -(-4 * math.prod(shape) // _ALIGNMENT) * _ALIGNMENT


def host_copy_bytes(slice_map: SliceMap, rank: int) -> int:
    """Bytes of host memory that the copy of one rank takes."""
    return sum(_padded(shape) for _, _, shape in _tensors(slice_map, rank))


class HostCopy:
    """``parameters`` and ``adam`` as they were at the last `take`, float32 on the CPU.

    Of tensors of which this rank owns no part (copies on other replicas) an empty one stands there: nothing
    is sent or written of them.

    Raises:
        DeviceError: the host has not so much memory.
    """

    def __init__(self, slice_map: SliceMap, rank: int, device: torch.device) -> None:
        self.size = host_copy_bytes(slice_map, rank)
        self.adam: dict[str, dict[str, torch.Tensor]] = {}
        self._device = device
        self.parameters, self._moments = _views(self._memory(rank), slice_map, rank)

    def _memory(self, rank: int) -> mmap.mmap:
        try:
            memory = SharedMemory(self.size)
            memory.take(self.size)
        except OSError as error:
            raise DeviceError(
                f"rank {rank} cannot take {self.size:,} bytes of host memory for saving in the background "
                f"({error.strerror}): free some, or use --async-checkpoint off"
            ) from error
        memory.close()
        if self._device.type == "cuda" and self.size:
            _pin(memory.memory, self.size)
        return memory.memory

    def take(self, parameters: Mapping[str, torch.Tensor], adam: Adam) -> None:
        """Copy what the tensors hold now; done when this returns.

        ``adam`` is empty before the first step; then so is the copy's.
        """
        for name, copy in self.parameters.items():
            if copy.numel():
                copy.copy_(parameters[name].detach(), non_blocking=True)
        self.adam = {}
        for name, state in adam.items():
            moments = self._moments[name]
            for key, copy in moments.items():
                if copy.numel():
                    copy.copy_(state[key].detach(), non_blocking=True)
            self.adam[name] = dict(moments)
        steps = [state["step"].detach().to(torch.float32) for state in adam.values()]
        for state, step in zip(self.adam.values(), torch.stack(steps).cpu() if steps else (), strict=True):
            state["step"] = step
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _pin(memory: mmap.mmap, size: int) -> None:
    """Let the GPU write to the memory by itself."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    runtime = torch.cuda.cudart()
    if runtime.cudaHostRegister(address, size, 0) != runtime.cudaError.success:
        raise DeviceError(
            f"CUDA cannot pin {size:,} bytes of host memory for saving in the background: raise the limit of "
            "locked memory (ulimit -l), or use --async-checkpoint off"
        )


def _views(memory: mmap.mmap, slice_map: SliceMap, rank: int) -> tuple[dict[str, torch.Tensor], Moments]:
    """The tensors of one rank's copy in its memory: weights, and Adam's moments."""
    parameters = {name: torch.empty(0) for name in slice_map.names}
    moments = {name: {key: torch.empty(0) for key in ADAM_KEYS} for name in slice_map.names}
    offset = 0
    for name, key, shape in _tensors(slice_map, rank):
        numel = math.prod(shape)
        if numel:
            part = torch.frombuffer(memory, dtype=torch.float32, count=numel, offset=offset).view(shape)
            if key == "param":
                parameters[name] = part
            else:
                moments[name][key] = part
        offset += _padded(shape)
    return parameters, moments
