"""The plan's memory against the peak of real steps on the CPU: every switch and layout, within 10 %."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from argonne.config.options import ParallelOptions, TrainingOptions
from argonne.config.presets import PRESETS
from argonne.ranks.world import World, build_parallel
from argonne.testing.distributed import run_ranks
from argonne.testing.peak_memory import PeakTensors
from argonne.tp.costs import ModelOutline
from argonne.tp.plan_memory import Layout, rank_memory
from argonne.tp.shape_only import shape_only
from argonne.training.build import build_model
from argonne.training.step import TrainingStep, Votes
from data_stream import StepBatch

SHAPE: dict[str, Any] = {
    **PRESETS["argonne-tiny"], "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704,
}  # fmt: skip
ALL_SWITCHES: dict[str, Any] = {
    "qk_norm": True, "v_norm": True, "sandwich_norm": True, "logit_softcap": 15.0, "z_loss_weight": 0.01,
}  # fmt: skip
BATCH, LENGTH = 4, 256


def measured(world_size: int, rank: int, case: dict[str, Any]) -> tuple[int, int]:
    """(peak, planned) bytes of one step; the process group is there."""
    switches, options, tp_size, accumulation, training = (
        case["switches"], case["options"], case["tp_size"], case["accumulation"], case["training"],
    )  # fmt: skip
    settings = {**SHAPE, **switches}
    parallel = build_parallel(
        World(
            rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size,
            device=torch.device("cpu"), control_group=dist.group.WORLD, feed_group=None,
        ),
        tp_size,
    )  # fmt: skip
    asked = TrainingOptions(batch_size=BATCH, block_size=LENGTH, **training)
    trained = build_model(settings, ParallelOptions(**options), asked, parallel)
    for parameter in trained.parameters().values():
        parameter.normal_(0, 0.02)
    tokens = torch.randint(0, settings["vocab_size"], (BATCH * accumulation * parallel.dp_size, LENGTH + 1))
    moments = [value for state in trained.adam().values() for value in state.values()]
    step = TrainingStep(trained, asked, accumulation)
    batch = StepBatch(tokens=tokens, stream_hash="", progress=None, wait_seconds=0.0)
    with PeakTensors([*trained.parameters().values(), *moments, tokens]) as peak:
        step.run(batch, 0, votes=Votes())
    layout = Layout(
        tp_size=tp_size,
        dp_size=parallel.dp_size,
        fsdp=options.get("data_parallel", "fsdp") == "fsdp",
        keeps_gathered=options.get("reshard_after_forward") == "off",
        sequence_parallel=options.get("sequence_parallel", False),
        recomputation=options.get("activation_checkpointing", "none"),
        batch_size=BATCH,
        block_size=LENGTH,
        accumulation=accumulation,
        element_bytes=2 if training.get("dtype") == "bf16" else 4,
        loss_chunk_tokens=training.get("loss_chunk_tokens"),
    )
    model = shape_only(settings)
    return peak.peak, rank_memory(ModelOutline.of(model), model, layout).total


def case(
    world_size: int = 1, tp_size: int = 1, accumulation: int = 1, switches: Any = None, **flags: Any
) -> tuple[int, dict[str, Any]]:
    training = {key: flags.pop(key) for key in ("loss_chunk_tokens", "dtype") if key in flags}
    return world_size, {
        "tp_size": tp_size, "accumulation": accumulation, "switches": switches or {}, "options": flags,
        "training": training,
    }  # fmt: skip


CASES = {
    "plain": case(),
    "all at once": case(loss_chunk_tokens=0),
    "small chunks": case(loss_chunk_tokens=100),
    "accumulation": case(accumulation=2),
    "full": case(activation_checkpointing="full"),
    "selective": case(activation_checkpointing="selective"),
    "bf16": case(dtype="bf16"),
    "bf16 at once": case(dtype="bf16", loss_chunk_tokens=0),
    "bf16 full": case(dtype="bf16", activation_checkpointing="full"),
    "tp 2": case(2, 2),
    "tp 4 sequence": case(4, 4, sequence_parallel=True),
    "tp 2 sequence full": case(2, 2, sequence_parallel=True, activation_checkpointing="full"),
    "tp 2 sequence selective": case(2, 2, sequence_parallel=True, activation_checkpointing="selective"),
    "tp 2 sequence bf16": case(2, 2, sequence_parallel=True, dtype="bf16"),
    "fsdp": case(2, 1),
    "fsdp tp 2": case(4, 2),
    "fsdp bf16": case(2, 1, dtype="bf16"),
    "fsdp accumulation": case(2, 1, accumulation=3),
    "fsdp kept": case(2, 1, reshard_after_forward="off"),
    "fsdp tp 2 kept bf16": case(4, 2, reshard_after_forward="off", dtype="bf16"),
    "untied": case(switches={"tie_word_embeddings": False}),
    "biases": case(switches={"attention_bias": True, "mlp_bias": True}),
    "qk_norm": case(switches={"qk_norm": True}),
    "v_norm": case(switches={"v_norm": True}),
    "sandwich_norm": case(switches={"sandwich_norm": True}),
    "softcap": case(switches={"logit_softcap": 15.0}),
    "z-loss": case(switches={"z_loss_weight": 0.01}),
    "window": case(switches={"interleaved_local_attention": True, "local_attention_window": 64}),
    "all switches": case(switches=ALL_SWITCHES),
    "all switches at once": case(switches=ALL_SWITCHES, loss_chunk_tokens=0),
    "all switches tp 2 sequence": case(2, 2, switches=ALL_SWITCHES, sequence_parallel=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_small_model_within_ten_per_cent(name: str) -> None:
    """The other ranks are not there: a fake process group stands in for them."""
    world_size, flags = CASES[name]
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        peak, planned = measured(world_size, 0, flags)
    finally:
        dist.destroy_process_group()
    assert planned == pytest.approx(peak, rel=0.10)


def replica_rank(rank: int, world_size: int) -> tuple[int, int]:
    return measured(world_size, rank, case(2, 1, data_parallel="ddp")[1])


@pytest.mark.slow
def test_replicas_of_ddp_within_ten_per_cent() -> None:
    for peak, planned in run_ranks(replica_rank, 2):
        assert planned == pytest.approx(peak, rel=0.10)
