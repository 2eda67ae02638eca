"""Other ways to split the same model, in the same measures: pipeline, fully sharded, data parallel."""

from __future__ import annotations

import math

from torch import nn

from argonne.tp.costs import (
    MASTER_BYTES,
    ModelOutline,
    SplitCost,
    Traffic,
    activation_bytes,
    add_traffic,
    tensor_parallel,
)
from argonne.tp.slices import padded_slice_size


def naive_split(outline: ModelOutline, ranks: int, tokens: int, element_bytes: int) -> SplitCost:
    """Every projection split for itself: its output gathered forward, its input's gradient reduced backward.

    What ``ColumnParallelLinear(gather_output=True)`` in place of every linear layer does, the head included.
    """
    unit = tokens * element_bytes
    layers, count = outline.num_layers, len(outline.projections)

    def whole(features: int) -> int:
        """Including the padding that a gather sends too."""
        return ranks * padded_slice_size(features, ranks)

    gathered = layers * sum(whole(p.out_features) for p in outline.projections) + whole(outline.vocab_size)
    reduced = layers * sum(p.in_features for p in outline.projections) + outline.hidden_size
    forward: Traffic = {
        "all_gather": (layers * count + 1, unit * gathered),
        "all_reduce": (1, unit * outline.hidden_size),
    }
    local = sum(padded_slice_size(outputs, ranks) * each for outputs, each in outline.divided)
    undivided = outline.parameters - sum(outputs * each for outputs, each in outline.divided)
    return SplitCost(
        name="naive (projections alone)",
        ranks=ranks,
        parameters_per_rank=local + undivided,
        activation_bytes=activation_bytes(outline, tokens, 1, sequence_parallel=False),
        forward=forward,
        step=add_traffic(forward, {"all_reduce": (layers * count + 1, unit * reduced)}),
        waits=f"{count} a layer each way",
        source="one gather, one reduction per linear layer",
        remark="full logits on every rank",
    )


def pipeline(outline: ModelOutline, ranks: int, tokens: int, element_bytes: int) -> SplitCost:
    """Stages of whole layers; activations and gradients go from stage to stage (Narayanan et al. 2021).

    Counted for the stage that sends the most. Cutting the batch into micro-batches leaves the bytes the same;
    at most one micro-batch per stage is in flight. The first and last stage of a tied model exchange the
    gradients of their copies of the embedding.
    """
    layers = outline.num_layers
    held = []
    for stage in range(ranks):
        own = layers // ranks + (stage < layers % ranks)
        parameters = own * outline.block_parameters
        parameters += outline.embedding_parameters * (stage == 0)
        parameters += outline.head_parameters * (stage == ranks - 1)
        held.append(parameters)
    message = tokens * outline.hidden_size * element_bytes
    tied = f"{outline.plan.head}.weight" not in outline.slice_map.names
    inner, end = 2 * message * (ranks > 2), message
    copies = tied * outline.vocab_size * outline.hidden_size * MASTER_BYTES
    step: Traffic = {"send": (2, inner)}
    if end + copies > inner:
        step = {"send": (1 + tied, end + copies)}
    whole = activation_bytes(outline, tokens, 1, sequence_parallel=False)
    return SplitCost(
        name="pipeline parallel",
        ranks=ranks,
        parameters_per_rank=max(held),
        activation_bytes=round(whole * math.ceil(layers / ranks) / layers),
        forward={"send": (1, message)},
        step=step,
        waits=f"neighbours; idle {ranks - 1} of m + {ranks - 1} slots",
        source="Narayanan et al. 2021, section 2.2 (1F1B)",
        remark="m micro-batches; tied ends exchange the embedding's gradient" if tied else "m micro-batches",
    )


def fully_sharded(outline: ModelOutline, ranks: int, tokens: int, element_bytes: int) -> SplitCost:
    """FSDP: the batch is divided, weights gathered block by block (Rajbhandari et al. 2020, section 7)."""
    blocks = outline.num_layers * outline.block_parameters
    units = outline.num_layers + 1
    forward: Traffic = {"all_gather": (units, outline.parameters * element_bytes)}
    backward: Traffic = {
        "all_gather": (units - 1, blocks * element_bytes),
        "reduce_scatter": (units, outline.parameters * MASTER_BYTES),
    }
    return SplitCost(
        name="FSDP (ZeRO-3)",
        ranks=ranks,
        parameters_per_rank=math.ceil(outline.parameters / ranks),
        activation_bytes=activation_bytes(outline, math.ceil(tokens / ranks), 1, sequence_parallel=False),
        forward=forward,
        step=add_traffic(forward, backward),
        waits="each block's weights, twice; overlapped",
        source="Rajbhandari et al. 2020, section 7",
        remark="bytes do not depend on the batch",
    )


def data_parallel(outline: ModelOutline, ranks: int, tokens: int) -> SplitCost:
    """DDP: whole model on every rank, the batch divided, gradients averaged once a step."""
    return SplitCost(
        name="data parallel (DDP)",
        ranks=ranks,
        parameters_per_rank=outline.parameters,
        activation_bytes=activation_bytes(outline, math.ceil(tokens / ranks), 1, sequence_parallel=False),
        forward={},
        step={"all_reduce": (1, outline.parameters * MASTER_BYTES)},
        waits="gradients, once; overlapped",
        source="Li et al. 2020 (PyTorch Distributed), section 3",
        remark="in buckets",
    )


def all_splits(
    model: nn.Module, ranks: int, tokens: tuple[int, int], element_bytes: int
) -> tuple[SplitCost, ...]:
    """Every way to put ``model`` (meta tensors will do) on ``ranks`` ranks, this suite's first."""
    outline = ModelOutline.of(model)
    count = tokens[0] * tokens[1]
    ours = [tensor_parallel(outline, model, ranks, tokens, element_bytes)]
    if outline.plan.sequence_parallel:
        ours.append(tensor_parallel(outline, model, ranks, tokens, element_bytes, sequence_parallel=True))
    return (
        *ours,
        naive_split(outline, ranks, count, element_bytes),
        pipeline(outline, ranks, count, element_bytes),
        fully_sharded(outline, ranks, count, element_bytes),
        data_parallel(outline, ranks, count),
    )
