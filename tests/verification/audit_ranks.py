"""Ranks that take a step and audit a layer of it, with or without a fault on one of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import argonne.tp.fused as fused
import model as model_file
from argonne.config.options import ParallelOptions
from argonne.ranks.recompute import compile_blocks
from argonne.testing.distributed import make_parallel
from argonne.training.audit import Verdict, judge
from argonne.training.build import TrainedModel, build_model, fill_weights
from argonne.training.step import TrainingStep, Votes
from argonne.verification.block_tap import BlockTap, checksums
from argonne.verification.layer_audit import Compared, LayerAudit
from tests.training.small_run import BLOCK, SEED, SETTINGS, batch_of, training_options

LAYER = 1
ALL_SWITCHES: dict[str, Any] = {
    "qk_norm": True,
    "v_norm": True,
    "sandwich_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "interleaved_local_attention": True,
    "local_attention_window": 3,
}
Fault = Callable[[TrainedModel], Callable[[], None]]
"""Puts a fault into a model between two steps; what it returns takes it out again."""


def build(
    rank: int,
    world_size: int,
    tp_size: int,
    training: dict[str, Any],
    *,
    settings: dict[str, Any] | None = None,
    compiled: bool = False,
    **options: Any,
) -> TrainedModel:
    """A small model over the ranks, with drawn weights and random norms."""
    parallel = make_parallel(rank, world_size, tp_size)
    group = dist.new_group(backend="gloo") if world_size > 1 else None
    parallel = dataclasses.replace(parallel, control_group=group)
    shape = {**SETTINGS, **(settings or {})}
    trained = build_model(shape, ParallelOptions(**options), training_options(**training), parallel)
    fill_weights(trained, None, SEED)
    if compiled:
        compile_blocks(trained.model.blocks, backend="eager")
    return trained


@dataclasses.dataclass
class Audited:
    """What one rank knows after the audited step."""

    verdict: Verdict | None
    found: list[Compared]
    """Of the oracle; empty elsewhere."""


def audit(
    trained: TrainedModel,
    training: dict[str, Any],
    *,
    accumulation: int = 1,
    oracle: int = 0,
    fault: Fault | None = None,
    when: str = "in the step",
    documents: bool = False,
) -> Audited:
    """Two steps, of which the second is audited.

    The fault is made "in the step", "at rest" before it, or "earlier".
    """
    step = TrainingStep(trained, training_options(**training), accumulation)
    samples, length = 2 * trained.parallel.dp_size * accumulation, training.get("block_size", BLOCK)
    batches = [batch_of(samples, seed=seed) for seed in range(2)]
    ids = torch.arange(length, dtype=torch.int32)[None].expand(samples, -1) // 5
    batches = [
        dataclasses.replace(
            batch, tokens=batch.tokens[:, : length + 1], document_ids=ids if documents else None
        )
        for batch in batches
    ]
    step.run(batches[0], 0, votes=Votes())
    undo = []

    def moment(now: str) -> None:
        if fault is not None and now == when:
            undo.append(fault(trained))

    moment("earlier")
    rest = checksums(dict(trained.model.blocks[LAYER].named_parameters()))
    moment("at rest")
    tap = BlockTap(trained.model, LAYER)
    moment("in the step")
    step.run(batches[1], 1, votes=Votes())
    for put_right in undo:
        put_right()
    tap.remove()
    verdict = judge(trained, tap, oracle, rest)
    found = LayerAudit(trained.model, tap, trained.parallel, trained.dtype).compare(oracle)
    return Audited(verdict, found)


def audit_rank(
    rank: int, world_size: int, tp_size: int, training: dict[str, Any], options: dict[str, Any]
) -> Audited:
    """Without a fault."""
    options = dict(options)
    how = {key: options.pop(key) for key in ("accumulation", "oracle", "documents") if key in options}
    return audit(build(rank, world_size, tp_size, training, **options), training, **how)


# ----------------------------------------------------------------------------------- faults


def wrong_attention(_: TrainedModel) -> Callable[[], None]:
    """A kernel that gets one query of each sequence wrong."""
    kernel = model_file.sdpa_attention

    def faulty(*args: Any) -> torch.Tensor:
        output = kernel(*args)
        spoilt = torch.ones_like(output)
        spoilt[:, :, 5] = 0.5
        return output * spoilt

    model_file.sdpa_attention = faulty  # type: ignore[assignment]

    def undo() -> None:
        model_file.sdpa_attention = kernel

    return undo


def wrong_product(_: TrainedModel) -> Callable[[], None]:
    """A matrix product of the backward pass that gets its last row wrong."""
    product = fused.matrix_product

    def faulty(*args: Any) -> torch.Tensor:
        output = product(*args)
        output[-1] *= 0.5
        return output

    fused.matrix_product = faulty  # type: ignore[assignment]

    def undo() -> None:
        fused.matrix_product = product

    return undo


def flipped_activation(trained: TrainedModel) -> Callable[[], None]:
    """One bit of one number on its way out of the block, on this rank alone."""
    block: Any = trained.model.blocks[LAYER]
    hook = block.register_forward_hook(lambda _, __, output: flip(output))
    remove: Callable[[], None] = hook.remove
    return remove


def flip(tensor: torch.Tensor, bit: int = 28) -> torch.Tensor:
    """A copy in which one bit of the 7th number is another."""
    copy = tensor.clone()
    with torch.no_grad():
        bits = copy.view(-1).view(torch.int32)
        bits[7] ^= 1 << bit
    return copy


def flipped_weight(trained: TrainedModel) -> Callable[[], None]:
    """The lowest bit of one weight."""
    weight = trained.parameters()[f"blocks.{LAYER}.mlp.gate_proj.weight"]
    weight.copy_(flip(weight, bit=0))
    return lambda: None


def flipped_norm(trained: TrainedModel) -> Callable[[], None]:
    """The lowest bit of a weight that all ranks of a replica hold."""
    weight = trained.parameters()[f"blocks.{LAYER}.post_norm.weight"]
    weight.copy_(flip(weight, bit=0))
    return lambda: None


def miscompiled(trained: TrainedModel) -> Callable[[], None]:
    """A block whose compiled code is not the block's."""
    block: Any = trained.model.blocks[LAYER]
    tapped = block._compiled_call_impl  # the tap stands in front of it

    def wrong(graph: Any, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            return tuple(output * 1.01 if output.is_floating_point() else output for output in graph(*args))

        return run

    tapped.__self__._compiled = torch.compile(block._call_impl, dynamic=False, backend=wrong)
    return lambda: None


FAULTS: dict[str, Fault] = {
    "attention": wrong_attention,
    "product": wrong_product,
    "activation": flipped_activation,
    "weight": flipped_weight,
    "norm": flipped_norm,
    "compiled": miscompiled,
}


def faulty_rank(
    rank: int, world_size: int, tp_size: int, name: str, culprit: int, options: dict[str, Any]
) -> Audited:
    """One fault on world rank ``culprit``."""
    options = dict(options)
    training = options.pop("training", {})
    how = {key: options.pop(key) for key in ("oracle", "when") if key in options}
    trained = build(rank, world_size, tp_size, training, **options)
    return audit(trained, training, fault=FAULTS[name] if rank == culprit else None, **how)
