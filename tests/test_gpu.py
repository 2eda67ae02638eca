"""On a GPU (pytest --gpu): kernels, agreement with the CPU, compilation, memory, whole runs."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import argonne.testing.corpus as corpus
from argonne.config.options import ParallelOptions, TrainingOptions
from argonne.ranks.recompute import compile_blocks
from argonne.testing.launch import SHAPE, checkpoint, launch, metrics
from argonne.testing.models import random_tokens, relative_error, small_model
from argonne.training.build import build_model, fill_weights
from tests.model.documents_alone import ids_of, random_spans
from tp_shard import shard_tensor_parallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.timeout(600),
]


def benchmark(name: str) -> Any:
    return importlib.import_module(name)


def test_attention_at_head_dim_170_is_flash() -> None:
    backend = benchmark("argonne.benchmarks.gpu_attention").backend_of(170, torch.device("cuda"), 4096)
    print(f"head_dim 170: {backend}")
    assert backend == "flash_attention"


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 8}, {"tie_word_embeddings": False}])
def test_gradients_agree_with_the_cpu(changes: dict[str, Any]) -> None:
    tokens = random_tokens()
    gradients = []
    for device in ("cpu", "cuda"):
        model = shard_tensor_parallel(small_model(torch.float64, **changes)).to(device)
        moved = tokens.to(device)
        model(input_ids=moved[:, :-1], shift_labels=moved[:, 1:]).loss.backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) < 1e-10, name


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_agree_with_the_cpu(compiled: bool) -> None:
    """Flex attention in float32, over several blocks, with a window in one of the layers."""
    tokens, spans = random_tokens(length=601), random_spans(2, 600)
    changes = {"head_dim": 64, "interleaved_local_attention": True, "local_attention_window": 150}
    gradients = []
    for device in ("cpu", "cuda"):
        model = shard_tensor_parallel(small_model(torch.float32, **changes)).to(device)
        if compiled and device == "cuda":
            compile_blocks(model.blocks)  # type: ignore[arg-type]
        moved, ids = tokens.to(device), ids_of(spans).to(device)
        model(input_ids=moved[:, :-1], shift_labels=moved[:, 1:], document_ids=ids).loss.backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert relative_error(gradients[1][name], expected) < 1e-3, name


def trained_on_gpu(**options: Any) -> tuple[Any, Any]:
    """A split model at tp 1 in bfloat16, and its training step on a fixed batch."""
    models = benchmark("argonne.benchmarks.models")
    shape = models.Shape(
        hidden_size=1020, layers=2, heads=6, key_value_heads=2, intermediate_size=704, vocab_size=1000,
        batch=2, seq_len=256,
    )  # fmt: skip
    training: TrainingOptions = models.training_options(shape)
    trained = build_model(shape.settings(), ParallelOptions(**options), training, models.alone("cuda"))
    fill_weights(trained, None, seed=3)
    return trained, models.our_step(trained, shape)


@pytest.mark.parametrize(
    "options",
    [{}, {"compile": True}, {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}],
)
def test_steps_learn_in_bfloat16(options: dict[str, Any]) -> None:
    trained, step = trained_on_gpu(**options)
    assert trained.dtype is torch.bfloat16
    losses = [step() for _ in range(8)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(1000) + 0.5, abs=0.5)
    assert losses[-1] < losses[0]


def test_compiled_blocks_have_no_graph_break() -> None:
    trained, _ = trained_on_gpu()
    block = trained.model.blocks[0]
    x = torch.randn(2, 64, 1020, device="cuda", dtype=torch.bfloat16)
    cos = torch.randn(1, 64, 1, 170, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        explanation = torch._dynamo.explain(block)(x, position_embeddings=(cos, cos))
    assert explanation.graph_break_count == 0, explanation.break_reasons


def test_a_rank_of_eight_uses_what_the_formula_says() -> None:
    gpu = benchmark("argonne.benchmarks.gpu")
    shape = gpu.Shape(
        hidden_size=2040, layers=8, heads=24, key_value_heads=8, intermediate_size=5504, vocab_size=32000,
        batch=4, seq_len=2048,
    )  # fmt: skip
    parallel = gpu.fake_world(torch.device("cuda"))
    try:
        measured = gpu.measure_step(shape, parallel, 2)
    finally:
        torch.distributed.destroy_process_group()
    assert measured.peak_bytes <= 1.10 * measured.expected_bytes


def test_a_run_is_resumed_on_the_gpu(tmp_path: Path) -> None:
    data_glob, tokenizer, _ = corpus.small_corpus(tmp_path)
    flags = [*SHAPE, "--tokenizer-path", tokenizer, "--data-glob", data_glob]
    flags += ["--warmup-steps", "2", "--checkpoint-interval", "3"]
    processes = min(2, torch.cuda.device_count())
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for output, steps in ((whole, 6), (stopped, 3), (stopped, 6)):
        finished = launch(processes, *flags, "--output-dir", output, "--total-steps", steps)
        assert finished.code == 0, finished.stderr
    assert checkpoint(stopped, 6).exists()
    resumed, straight = metrics(stopped), metrics(whole)
    assert [line["stream_hash"] for line in resumed] == [line["stream_hash"] for line in straight]
    # The schedule's length differs in the first three steps; the loss there hardly moves.
    assert resumed[-1]["loss"] == pytest.approx(straight[-1]["loss"], rel=5e-2)
    assert all(line["peak_memory_bytes"] > 0 for line in straight)
