"""On a GPU (pytest --gpu): kernels, agreement with the CPU, compilation, memory, whole runs.

All but the name of the kernel runs on the CPU as well, at small sizes, so that no test breaks unseen.
"""

import contextlib
import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import argonne.testing.corpus as corpus
from argonne.config.options import ParallelOptions, TrainingOptions
from argonne.data.feed import StepBatch
from argonne.ranks.recompute import compile_blocks
from argonne.testing.launch import SHAPE, checkpoint, launch, metrics
from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.training.build import build_model, fill_weights
from argonne.training.step import TrainingStep, Votes
from tests.model.documents_alone import ids_of, random_spans
from tp_shard import gather_state_dict, shard_tensor_parallel

pytestmark = pytest.mark.timeout(600)

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
on_devices_slowly = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=ON_GPU)]
)

TABLE_ERROR = 1e-6
"""The rotary tables are float32 and differ by an ulp between devices, also under float64 weights."""


def benchmark(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("head_dim", [170, 176])
def test_attention_at_head_dim_170_is_flash_as_it_is_and_padded(head_dim: int, device: str) -> None:
    backend = benchmark("argonne.benchmarks.gpu_attention").backend_of(head_dim, torch.device(device), 4096)
    print(f"head_dim {head_dim}: {backend}")
    assert backend == "flash_attention"


@on_devices
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 8}, {"tie_word_embeddings": False}])
def test_gradients_agree_with_the_cpu(changes: dict[str, Any], device: str) -> None:
    tokens = random_tokens()
    gradients = []
    for place in ("cpu", device):
        model = shard_tensor_parallel(small_model(torch.float64, **changes)).to(place)
        moved = tokens.to(place)
        model(input_ids=moved[:, :-1], shift_labels=moved[:, 1:]).loss.backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) < TABLE_ERROR, name


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padded_heads_agree_with_the_cpus_as_they_are(dtype: torch.dtype, device: str) -> None:
    changes = {"qk_norm": True, "v_norm": True, "attention_bias": True}
    tokens = random_tokens()
    gradients = []
    for place, pad_to in (("cpu", 1), (device, 8)):
        model = shard_tensor_parallel(small_model(dtype, **changes), pad_to=pad_to).to(place)
        moved = tokens.to(place)
        model(input_ids=moved[:, :-1], shift_labels=moved[:, 1:]).loss.backward()
        gradients.append({n: g.cpu() for n, g in gather_state_dict(model, gradients=True).items()})
    for name, expected in gradients[0].items():
        limit = TABLE_ERROR if dtype is torch.float64 else 1e-4
        assert relative_error(gradients[1][name], expected) < limit, name


@on_devices_slowly
@pytest.mark.parametrize("compiled", [False, True])
def test_documents_agree_with_the_cpu(compiled: bool, device: str) -> None:
    """Flex attention in float32, over several blocks, with a window in one of the layers."""
    tokens, spans = random_tokens(length=601), random_spans(2, 600)
    changes = {"head_dim": 64, "interleaved_local_attention": True, "local_attention_window": 150}
    gradients = []
    for place, compile_it in (("cpu", False), (device, compiled)):
        model = shard_tensor_parallel(small_model(torch.float32, **changes)).to(place)
        if compile_it:
            compile_blocks(model.blocks)  # type: ignore[arg-type]
        moved, ids = tokens.to(place), ids_of(spans).to(place)
        model(input_ids=moved[:, :-1], shift_labels=moved[:, 1:], document_ids=ids).loss.backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) < 1e-3, name


def trained_shape(device: str) -> Any:
    """Narrower on the CPU."""
    head_dim, length = (170, 256) if device == "cuda" else (34, 32)
    return benchmark("argonne.benchmarks.models").Shape(
        hidden_size=6 * head_dim, layers=2, heads=6, key_value_heads=2, intermediate_size=704,
        vocab_size=1000, batch=2, seq_len=length,
    )  # fmt: skip


def trained_tokens(device: str) -> Any:
    """As the feed hands them over: pinned where a GPU fetches them."""
    tokens = trained_shape(device).tokens()
    return tokens.pin_memory() if device == "cuda" else tokens


@contextlib.contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """On a GPU an error where the host waits for it."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def trained_on(device: str, **options: Any) -> tuple[Any, Any]:
    """A split model at tp 1 in bfloat16, and its training step on a fixed batch."""
    models, shape = benchmark("argonne.benchmarks.models"), trained_shape(device)
    training: TrainingOptions = replace(models.training_options(shape), dtype="bf16")
    trained = build_model(shape.settings(), ParallelOptions(**options), training, models.alone(device))
    fill_weights(trained, None, seed=3)
    return trained, models.our_step(trained, shape)


@on_devices_slowly
@pytest.mark.parametrize(
    "options",
    [{}, {"compile": True}, {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}],
)
def test_steps_learn_in_bfloat16(options: dict[str, Any], device: str) -> None:
    trained, step = trained_on(device, **options)
    assert trained.dtype is torch.bfloat16
    losses = [step() for _ in range(8)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(1000) + 0.5, abs=0.5)
    assert losses[-1] < losses[0]


@on_devices
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "full"}])
def test_the_host_waits_for_nothing_in_a_step(options: dict[str, Any], device: str) -> None:
    """A step is given to the device whole: torch raises where the host would wait for it."""
    models = benchmark("argonne.benchmarks.models")
    trained, step = trained_on(device, **options)
    step()
    shape, tokens = trained_shape(device), trained_tokens(device)
    one_step = TrainingStep(trained, models.training_options(shape), 1)
    batch = StepBatch(tokens=tokens, stream_hash="", progress=None, wait_seconds=0.0)
    with without_waiting(device):
        started = one_step.start(batch, 0, votes=Votes())
    assert math.isfinite(one_step.finish(started).totals.loss)
    if device == "cuda":
        with without_waiting(device), pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=device).item()


@on_devices
def test_compiled_blocks_have_no_graph_break(device: str) -> None:
    trained, _ = trained_on(device)
    block, config = trained.model.blocks[0], trained.model.config
    x = torch.randn(2, 64, config.hidden_size, device=device, dtype=torch.bfloat16)
    cos = torch.randn(1, 64, 1, config.head_dim, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        explanation = torch._dynamo.explain(block)(x, position_embeddings=(cos, cos))
    assert explanation.graph_break_count == 0, explanation.break_reasons


@on_devices
def test_a_rank_of_eight_uses_what_the_formula_says(device: str) -> None:
    """On the CPU nothing counts its memory: there the test shows that the shape is one that can be split."""
    gpu = benchmark("argonne.benchmarks.gpu")
    shape = gpu.Shape(
        hidden_size=2016, layers=8, heads=24, key_value_heads=8, intermediate_size=5504, vocab_size=32000,
        batch=4, seq_len=2048,
    )  # fmt: skip
    if device == "cpu":
        shape = replace(shape, layers=1, vocab_size=1000, batch=1, seq_len=16)
    parallel = gpu.fake_world(torch.device(device))
    try:
        measured = gpu.measure_step(shape, parallel, 2)
    finally:
        torch.distributed.destroy_process_group()
    assert measured.expected_bytes > 0
    assert measured.peak_bytes <= 1.10 * measured.expected_bytes


@on_devices_slowly
def test_a_run_is_resumed(device: str, tmp_path: Path) -> None:
    data_glob, tokenizer, _ = corpus.small_corpus(tmp_path)
    flags = [*SHAPE, "--tokenizer-path", tokenizer, "--data-glob", data_glob]
    flags += ["--warmup-steps", "2", "--checkpoint-interval", "3"]
    processes = min(2, torch.cuda.device_count()) if device == "cuda" else 2
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for output, steps in ((whole, 6), (stopped, 3), (stopped, 6)):
        finished = launch(processes, *flags, "--output-dir", output, "--total-steps", steps)
        assert finished.code == 0, finished.stderr
    assert checkpoint(stopped, 6).exists()
    resumed, straight = metrics(stopped), metrics(whole)
    assert [line["stream_hash"] for line in resumed] == [line["stream_hash"] for line in straight]
    # The schedule's length differs in the first three steps; the loss there hardly moves.
    assert resumed[-1]["loss"] == pytest.approx(straight[-1]["loss"], rel=5e-2)
    if device == "cuda":
        assert all(0 < line["peak_memory_bytes"] <= line["peak_reserved_bytes"] for line in straight)
