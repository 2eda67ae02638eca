"""Data parallelism in the plan: what replicas send each other, and among how many ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from argonne.config.options import ParallelOptions
from argonne.ranks.world import replicas_of_a_node
from tp_shard import Layout, ModelOutline, SliceMap, build_slice_map, sent_share

REPLICAS = " over replicas"
OF_A_NODE = f"{REPLICAS} of a node"
ROOM = 0.95
"""Of a device's memory, as far as the plan's error allows: room for weights that stay gathered."""


def shard_size(options: ParallelOptions, tp_size: int, world_size: int, node_size: int) -> int | None:
    """Replicas that share weights where not all do: those of a node, of --data-parallel hsdp.

    Raises ConfigError where a node has no several of them.
    """
    if options.data_parallel != "hsdp":
        return None
    return replicas_of_a_node(tp_size, world_size=world_size, node_size=node_size)


def replica_traffic(outline: ModelOutline, model: nn.Module, layout: Layout) -> dict[str, tuple[int, int]]:
    """Kind of collective -> calls and bytes of an optimizer step.

    DDP reduces all gradients once; FSDP2 gathers weights for each micro-batch, a block's again in its
    backward pass unless they stayed, and reduces once; hsdp does so within a node and sums across nodes.
    """
    if layout.dp_size == 1:
        return {}
    cuts = build_slice_map(model, outline.plan, layout.tp_size)
    local = _local_numel(cuts, cuts.names)
    if not layout.is_cut:
        return {f"all_reduce{REPLICAS}": (1, 4 * local)}
    layers, element = outline.num_layers, layout.element_bytes
    again = 0 if layout.keeps_gathered else layers
    in_block = [name for name in cuts.names if name.startswith(f"{outline.plan.first_block}.")]
    gathered = local + again * _local_numel(cuts, in_block)
    kind = OF_A_NODE if layout.copies > 1 else REPLICAS
    traffic = {
        f"all_gather{kind}": (
            layout.accumulation * (layers + 1 + again), layout.accumulation * element * gathered,
        ),
        f"reduce_scatter{kind}": (layers + 1, 4 * local),
    }  # fmt: skip
    if layout.copies > 1:
        traffic[f"all_reduce{REPLICAS}"] = (layers + 1, 4 * math.ceil(local / layout.shards))
    return traffic


def sending_ranks(kind: str, layout: Layout) -> int:
    """Ranks among which a kind of collective goes round."""
    if kind.endswith(OF_A_NODE):
        return layout.shards
    if kind.endswith(REPLICAS):
        return layout.copies if layout.is_cut and layout.copies > 1 else layout.dp_size
    return layout.tp_size


def replica_seconds(
    traffic: Mapping[str, tuple[int, int]], layout: Layout, *, within: float, across: float
) -> float:
    """If nothing hides them, at bytes a second ``within`` a node and ``across`` replicas."""
    seconds = 0.0
    for kind, (_, size) in traffic.items():
        if REPLICAS in kind:
            rate = within if kind.endswith(OF_A_NODE) else across
            seconds += size * sent_share(kind, sending_ranks(kind, layout)) / rate
    return seconds


def _local_numel(slice_map: SliceMap, names: Iterable[str]) -> int:
    chosen = list(names)
    return max(
        sum(math.prod(slice_map.tp_local_shape(name, rank)) for name in chosen)
        for rank in range(slice_map.tp_size)
    )
