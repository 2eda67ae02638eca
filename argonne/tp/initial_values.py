"""Initial values that do not depend on the layout.

Each unsharded parameter is drawn in chunks of whole rows, on the CPU, from a generator keyed by
(seed, parameter name, chunk). A rank draws the chunks its slices touch and keeps its part, so that every
parallel degree on every device starts from the same model without any rank holding it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from argonne.tp.slices import Rectangle, Shape, SliceMap

_CHUNK_ELEMENTS = 1 << 20


def _chunk_generator(seed: int, name: str, chunk: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{chunk}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _chunk_rows(shape: Shape) -> int:
    """Rows drawn from one generator; depends on the unsharded shape only."""
    return max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))


def _fill_chunk(
    local: Tensor, boxes: list[Rectangle], shape: Shape, name: str, seed: int, std: float, chunk: int
) -> None:
    """Draw one chunk and place what each of the boxes, all of which reach into it, has of it."""
    rows = _chunk_rows(shape)
    first = chunk * rows
    drawn = torch.empty((min(rows, shape[0] - first), *shape[1:]), dtype=torch.float32)
    drawn.normal_(0.0, std, generator=_chunk_generator(seed, name, chunk))
    for box in boxes:
        low = max(box.start[0], first)
        high = min(box.start[0] + box.size[0], first + drawn.shape[0])
        inner = box.unsharded_index[1:]
        into = low - box.start[0] + box.local_start[0]
        local[(slice(into, into + high - low), *box.local_index[1:])] = drawn[
            (slice(low - first, high - first), *inner)
        ]


def initialise_parameters(
    parameters: Mapping[str, Tensor],
    slice_map: SliceMap,
    rank: int,
    std_of: Callable[[str], float | None],
    seed: int,
) -> None:
    """Fill the local tensors of world rank ``rank`` in place; padding becomes zero.

    ``std_of`` gives the standard deviation of a parameter's normal draw by its unsharded name, 0.0 for
    zeros and None for ones.
    """
    tasks: list[tuple[Tensor, list[Rectangle], Shape, str, int, float, int]] = []
    for name, parameter in parameters.items():
        local = parameter.detach()
        local.zero_()
        std = std_of(name)
        shape = slice_map.shape(name)
        rows = _chunk_rows(shape)
        touched: dict[int, list[Rectangle]] = {}
        for box in slice_map.rectangles(name, rank):
            if std is None:
                local[box.local_index] = 1.0
            elif std > 0.0:
                for chunk in range(box.start[0] // rows, (box.start[0] + box.size[0] - 1) // rows + 1):
                    touched.setdefault(chunk, []).append(box)
        if std:
            tasks += [(local, boxes, shape, name, seed, std, chunk) for chunk, boxes in touched.items()]
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        for done in [pool.submit(_fill_chunk, *task) for task in tasks]:
            done.result()
