"""Gradients of key/value heads that several ranks hold, where they do not all hold the same ones.

A rank may share its first heads with the ranks before it and its last with those behind, and FSDP may have
cut the slices of two ranks in different places. So ranks that hold the same elements exchange them, and each
adds up in the order of ranks: copies stay equal to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from argonne.tp.group import TPGroup
from argonne.tp.slices import Rectangle, SliceMap


class CopiedGradients:
    """What this rank holds together with others, by the slice map of the ranks of ``group``."""

    def __init__(self, slice_map: SliceMap, group: TPGroup) -> None:
        self.group = group
        self._parts = [(name, part) for name in slice_map.copied for part in slice_map.copies(name)]

    def sum(self, gradients: Mapping[str, Tensor]) -> None:
        """Complete, in place, the local gradients of copied heads: one exchange."""
        rank = self.group.rank
        own = [(name, part) for name, part in self._parts if rank in part and name in gradients]
        views = [gradients[name][part[rank].local_index] for name, part in own]
        wide = [view.reshape(-1).to(torch.promote_types(view.dtype, torch.float32)) for view in views]
        peers: list[list[int]] = [
            [index for index, (_, part) in enumerate(own) if peer in part and peer != rank]
            for peer in range(self.group.size)
        ]
        sizes = [sum(wide[index].numel() for index in indices) for indices in peers]
        sent = _joined([wide[index] for indices in peers for index in indices], gradients)
        payload = sum(_exchanged(part) for name, part in self._parts if name in gradients)
        received = self.group.exchange(sent, sizes, payload * sent.element_size()).split(
            [wide[index].numel() for indices in peers for index in indices]
        )
        by_part: list[dict[int, Tensor]] = [{rank: mine} for mine in wide]
        places = [(index, peer) for peer, indices in enumerate(peers) for index in indices]
        for (index, peer), values in zip(places, received, strict=True):
            by_part[index][peer] = values
        for view, values in zip(views, by_part, strict=True):
            view.copy_(_total([values[peer] for peer in sorted(values)]).view_as(view))


def exchanged_elements(slice_map: SliceMap) -> int:
    """What all ranks send together to complete the gradients of copied heads."""
    alike = Counter((slice_map.shape(name), slice_map.cut(name)) for name in slice_map.copied)
    first = {(slice_map.shape(name), slice_map.cut(name)): name for name in reversed(slice_map.copied)}
    return sum(
        count * sum(_exchanged(part) for part in slice_map.copies(first[kind]))
        for kind, count in alike.items()
    )


def _exchanged(part: Mapping[int, Rectangle]) -> int:
    """Elements that the holders of one part send to each other."""
    return next(iter(part.values())).numel * len(part) * (len(part) - 1)


def _joined(parts: list[Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    if parts:
        return torch.cat(parts)
    some = next(iter(gradients.values()))
    return some.new_empty(0, dtype=torch.promote_types(some.dtype, torch.float32))


def _total(values: list[Tensor]) -> Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total
