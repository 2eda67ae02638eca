"""On one GPU: a rank's share of tp 8, the full model at tp 1, the gain of compilation, and head_dim 170.

The share runs in torch's fake process group of 8 ranks: real memory and real kernels, collectives that do
nothing. What it computes is therefore wrong, but finite and not zero (zeros would be faster); the time of
eight GPUs is predicted from it and the bytes to be sent, and called so.

``--device cpu`` runs all of it on a tiny model, to test the benchmark itself.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from argonne.benchmarks.common import Report, Row, interleaved, summary, timed_row
from argonne.benchmarks.gpu_attention import attention_rows, backend_of
from argonne.benchmarks.models import Shape, alone, our_step, training_options
from argonne.config.derived import width_multiple
from argonne.config.options import ParallelOptions
from argonne.errors import DeviceError
from argonne.ranks.world import Parallel, World, build_parallel
from argonne.run.metrics import peak_flops
from argonne.tp.costs import ModelOutline, tensor_parallel
from argonne.tp.device_rates import device_rates
from argonne.tp.plan_memory import Layout, rank_memory
from argonne.tp.plan_time import StepPrediction, StepTime
from argonne.training.build import TrainedModel, build_model, flops_per_token
from model import ArgonneConfig, ArgonneModel, initial_std

RANKS = 8
NVLINK_BYTES = 370e9
"""Bytes a second that each of 8 GPUs sends in large all-reduces (nccl-tests on H100)."""
REFERENCE = Shape(
    hidden_size=4080, layers=24, heads=24, key_value_heads=8, intermediate_size=11008, vocab_size=151665,
    batch=4, seq_len=4096,
)  # fmt: skip
TINY = Shape(
    hidden_size=144, layers=4, heads=24, key_value_heads=8, intermediate_size=88, vocab_size=515, batch=2,
    seq_len=32,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on the device."""

    seconds: list[float]
    """Of each step."""
    peak_bytes: int
    """Largest allocation (0 on the CPU)."""
    expected_bytes: int
    expected: StepTime
    """The plan's prediction of a step's parts, which does not know compilation."""
    flops: float
    """Of one step of the unsharded model."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Forget what the last model left: memory and compiled graphs."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fake_world(device: torch.device) -> Parallel:
    """Rank 0 of RANKS ranks that are not there."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    world = World(
        rank=0, world_size=RANKS, local_rank=0, local_world_size=RANKS, device=device,
        control_group=dist.group.WORLD, feed_group=None,
    )  # fmt: skip
    return build_parallel(world, RANKS)


def fill(trained: TrainedModel) -> None:
    """Random weights drawn on the device (the training script draws on the CPU, which takes minutes)."""
    config = trained.model.config
    for name, parameter in trained.parameters().items():
        std = initial_std(config, name)
        parameter.fill_(1.0) if std is None else parameter.normal_(0.0, std or 0.02)


def prediction(trained: TrainedModel, shape: Shape, options: Mapping[str, Any]) -> tuple[int, StepTime]:
    """The plan's peak of a rank (``argonne.tp.plan_memory``) and seconds of its step (``plan_time``)."""
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**shape.settings()))
    layout = Layout(
        tp_size=trained.parallel.tp_size,
        dp_size=trained.parallel.dp_size,
        sequence_parallel=bool(options.get("sequence_parallel")),
        recomputation=options.get("activation_checkpointing", "none"),
        batch_size=shape.batch,
        block_size=shape.seq_len,
    )
    on_gpu = trained.parallel.device.type == "cuda"
    outline = ModelOutline.of(model, width_multiple(ParallelOptions(**options), on_gpu=on_gpu))
    rates = device_rates(torch.cuda.get_device_name(trained.parallel.device) if on_gpu else "H100")
    predicted = StepPrediction(outline, model, layout, rates, node_size=RANKS)
    return rank_memory(outline, model, layout).total, predicted.time()


def measure_step(shape: Shape, parallel: Parallel, rounds: int, **options: Any) -> Measured:
    """Steps of the training loop, synchronised; checks that loss and gradient are finite and not zero."""
    device = parallel.device
    release()
    trained = build_model(shape.settings(), ParallelOptions(**options), training_options(shape), parallel)
    fill(trained)
    step = our_step(trained, shape)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def timed() -> float:
        synchronize(device)
        start = time.perf_counter()
        loss = step()
        synchronize(device)
        if not 0.0 < abs(loss) < 1e6:
            raise DeviceError(f"the loss is {loss}: the measured model does not compute")
        return time.perf_counter() - start

    seconds = interleaved({"step": timed}, rounds, warm_up=2)["step"]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    expected_bytes, expected = prediction(trained, shape, options)
    return Measured(
        seconds=seconds,
        peak_bytes=peak,
        expected_bytes=expected_bytes,
        expected=expected,
        flops=flops_per_token(trained, shape.seq_len) * shape.batch * shape.seq_len,
    )


def sent_bytes(shape: Shape, *, sequence_parallel: bool) -> int:
    """Bytes each of RANKS ranks sends in a step, bfloat16."""
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**shape.settings()))
    tokens = (shape.batch, shape.seq_len)
    outline = ModelOutline.of(model)
    return tensor_parallel(outline, model, RANKS, tokens, 2, sequence_parallel=sequence_parallel).sent_bytes


def memory_row(name: str, measured: Measured) -> list[Row]:
    if not measured.peak_bytes:
        return []
    return [Row(name=f"peak memory / formula, {name}", ours=measured.peak_bytes,
                peer=measured.expected_bytes, unit="B", target=1.10)]  # fmt: skip


def share_rows(shape: Shape, device: torch.device, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """One rank's share of tp 8: eager, compiled, without padded widths, with sequence parallelism."""
    variants: dict[str, dict[str, Any]] = {
        "eager": {},
        "eager, widths as they are": {"pad_widths": "off"},
        "compiled": {"compile": True},
        "compiled, widths as they are": {"compile": True, "pad_widths": "off"},
        "sequence parallel": {"sequence_parallel": True},
        "sequence parallel, compiled": {"sequence_parallel": True, "compile": True},
    }
    parallel = fake_world(device)
    try:
        measured = {
            name: measure_step(shape, parallel, rounds, **options) for name, options in variants.items()
        }
    finally:
        dist.destroy_process_group()
        release()
    rows: list[Row] = []
    data: dict[str, Any] = {}
    for name, result in measured.items():
        sent = sent_bytes(shape, sequence_parallel="sequence" in name)
        seconds = min(result.seconds)
        data[name] = {"seconds": summary(result.seconds), "predicted step": seconds + sent / NVLINK_BYTES,
                      "peak": result.peak_bytes, "formula": result.expected_bytes}  # fmt: skip
        computing = result.expected.total - result.expected.tensor_parallel - result.expected.waiting
        rows.append(
            timed_row(f"share of tp {RANKS}, {name}: computing / predicted", result.seconds,
                      [computing] * rounds)
        )  # fmt: skip
        rows.append(
            Row(name=f"predicted step of {RANKS} GPUs, {name}: nothing overlapped / computing",
                ours=seconds + sent / NVLINK_BYTES, peer=seconds, unit="s")
        )  # fmt: skip
        rows += memory_row(f"share of tp {RANKS}, {name}", result)
    rows.append(
        timed_row("gain of compilation, share of tp 8", measured["compiled"].seconds,
                  measured["eager"].seconds, inverse=True, at_least=True, target=1.10)
    )  # fmt: skip
    for how in ("eager", "compiled"):
        rows.append(
            timed_row(f"gain of padded widths, share of tp 8, {how}", measured[how].seconds,
                      measured[f"{how}, widths as they are"].seconds, inverse=True, at_least=True)
        )  # fmt: skip
    return rows, data


def fitting_layers(shape: Shape, device: torch.device) -> tuple[int, ...]:
    """All layers where the model fits at tp 1, otherwise two depths whose difference is extrapolated."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 120 * 2**30:
        return (4, 8)
    return (shape.layers,)


def full_rows(shape: Shape, device: torch.device, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """The unsplit model, one sequence a step: share of the device's peak (causal attention counted half)."""
    one = replace(shape, batch=1)
    depths = fitting_layers(one, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(name, "bf16")
    rows: list[Row] = []
    data: dict[str, Any] = {"layers": depths}
    for label, target, options in (("eager", 0.45, {}), ("compiled", 0.50, {"compile": True})):
        results = [
            measure_step(replace(one, layers=layers), alone(device), rounds, **options) for layers in depths
        ]
        release()
        seconds, flops = min(results[-1].seconds), results[-1].flops
        if len(results) == 2:  # what one more layer costs, carried on to the full depth
            more = (one.layers - depths[1]) / (depths[1] - depths[0])
            flops += more * (results[1].flops - results[0].flops)
            seconds += more * (min(results[1].seconds) - min(results[0].seconds))
        data[label] = {"seconds": seconds, "tokens per second": one.seq_len / seconds}
        rows += memory_row(f"tp 1, {label}, {depths[-1]} layers", results[-1])
        if peak is not None:
            how = "extrapolated" if len(results) == 2 else "measured"
            rows.append(Row(name=f"tp 1, {label}: share of the peak ({how})", ours=flops / seconds / 1e12,
                            peer=peak / 1e12, unit="TFLOP/s", at_least=True, target=target))  # fmt: skip
    return rows, data


def run(rounds: int, device_name: str = "cuda") -> Report:
    if device_name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("benchmark.py gpu needs a GPU, and torch sees none here (--device cpu tests it)")
    device = torch.device(device_name)
    shape = REFERENCE if device.type == "cuda" else TINY
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a tiny model"
    head_dim = shape.hidden_size // shape.heads
    print(f"attention backend of head_dim {head_dim}: {backend_of(head_dim, device)}", flush=True)
    parts: list[Callable[[], tuple[list[Row], dict[str, Any]]]] = [
        lambda: attention_rows(shape, device, rounds),
        lambda: share_rows(shape, device, rounds),
        lambda: full_rows(shape, device, rounds),
    ]
    results = [part() for part in parts]
    return Report(
        name="gpu",
        title=f"One GPU ({name}): minima of {rounds} rounds",
        rows=tuple(row for rows, _ in results for row in rows),
        remarks=(
            f"The share of tp {RANKS} computes real slices with collectives that do nothing; the step of "
            f"{RANKS} GPUs is predicted (plus bytes sent at {NVLINK_BYTES / 1e9:.0f} GB/s), not measured.",
            "Predicted: by the plan at its assumed rates, eager, without collectives and waiting.",
        ),
        data={"attention": results[0][1], "share": results[1][1], "full": results[2][1]},
    )
