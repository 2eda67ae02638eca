"""The main job through the command line: train, stop, resume, at any degree; and the pipeline fixtures."""

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.files import OutputFolder
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import (
    SCHEDULE,
    SHAPE,
    checkpoint,
    command,
    environment,
    launch,
    metrics,
    start,
    status,
    wait,
    wait_for_lines,
)
from model import ArgonneConfig, ArgonneModel
from tests import FIXTURES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=90, length=600)
    return ["--tokenizer-path", str(tokenizer), "--data-glob", glob]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """Twelve steps on two ranks, saved at step 6 and 12."""
    output = tmp_path_factory.mktemp("unbroken")
    flags = ["--total-steps", 12, "--checkpoint-interval", 6, "--sample-interval", 12, "--log-interval", 4]
    finished = launch(2, *data, *SHAPE, *SCHEDULE, *flags, "--output-dir", output)
    assert finished.code == 0, finished.stderr
    assert "starting from scratch" in finished.stdout
    assert finished.stdout.count("Step 4 | Loss: ") == 1
    assert "--- Generated text at step 12 ---\nLong long time ago, " in finished.stdout
    assert not finished.errors()
    return output


def resume_from_six(output: Path, unbroken: Path, data: list[str], processes: int, *more: Any) -> Path:
    (output / "pretrained").mkdir(parents=True)
    shutil.copy(checkpoint(unbroken, 6), output / "pretrained")
    flags = [*data, *SHAPE, *SCHEDULE, "--total-steps", 12, "--output-dir", output, *more]
    finished = launch(processes, *flags)
    assert finished.code == 0, finished.stderr
    return output


def tensors(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    found = {f"model.{name}": tensor for name, tensor in content["model_state_dict"].items()}
    for index, entry in content["optimizer_state_dict"]["state"].items():
        found |= {f"adam.{index}.{key}": tensor for key, tensor in entry.items()}
    return found


def test_metrics_and_status_of_a_whole_run(unbroken: Path) -> None:
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["tokens_processed"] == 12 * 2 * 64
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == pytest.approx(3e-4)
    assert lines[5]["lr"] == pytest.approx(3e-3)
    for key in ("grad_norm", "step_seconds", "tokens_per_second", "data_wait_seconds", "peak_memory_bytes"):
        assert lines[3][key] >= 0
    stand = status(unbroken)
    assert (stand["state"], stand["step"]) == ("finished", 12)
    assert stand["checkpoint"].endswith("step_12.pth")
    assert (unbroken / "stats" / "current_training_stats_tensor_parallel_step_6.json").exists()
    assert len(list((unbroken / "stats").glob("final_training_stats_tensor_parallel_*.json"))) == 1


def test_resume_at_the_same_degree_is_bit_identical(tmp_path: Path, unbroken: Path, data: list[str]) -> None:
    output = resume_from_six(tmp_path / "run", unbroken, data, 2)
    again, straight = tensors(checkpoint(output, 12)), tensors(checkpoint(unbroken, 12))
    assert again.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(again[name], tensor), name
    kept = ("loss", "grad_norm", "lr", "tokens_processed", "stream_hash")
    for mine, theirs in zip(metrics(output), metrics(unbroken)[6:], strict=True):
        assert {key: mine[key] for key in kept} == {key: theirs[key] for key in kept}


ACCUMULATED = ["--batch-size", 1, "--gradient-accumulation-steps", 2]


@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, ACCUMULATED),
        pytest.param(4, [], marks=pytest.mark.slow),
        pytest.param(3, ["--replica-check-interval", 1], marks=pytest.mark.slow),  # does not divide the heads
    ],
)
def test_resume_at_another_degree_agrees(
    tmp_path: Path, unbroken: Path, data: list[str], processes: int, more: list[Any]
) -> None:
    output = resume_from_six(tmp_path / "run", unbroken, data, processes, *more)
    for mine, theirs in zip(metrics(output), metrics(unbroken)[6:], strict=True):
        assert mine["stream_hash"] == theirs["stream_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-4)


@pytest.mark.slow
def test_two_replicas_see_the_tokens_of_one(tmp_path: Path, unbroken: Path, data: list[str]) -> None:
    flags = ["--tensor-parallel-size", 2, "--batch-size", 1, "--sequence-parallel"]
    output = resume_from_six(tmp_path / "run", unbroken, data, 4, *flags)
    for mine, theirs in zip(metrics(output), metrics(unbroken)[6:], strict=True):
        assert mine["stream_hash"] == theirs["stream_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)


def test_checkpoint_loads_into_a_plain_model_and_adamw(unbroken: Path) -> None:
    content = torch.load(checkpoint(unbroken, 12), weights_only=True)
    assert content["global_step"] == 12 and content["scheduler_state_dict"] == {"step": 11}
    config = {key: value for key, value in content["model_config"].items() if key != "model_type"}
    model = ArgonneModel(ArgonneConfig(**config))
    model.load_state_dict(content["model_state_dict"], strict=True)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(content["optimizer_state_dict"])
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    assert len(state) == len(names)
    assert all(state[i]["exp_avg"].shape == p.shape for i, p in enumerate(model.parameters()))
    assert state[0]["step"] == 12
    assert {"data_position", "model_dtype", "loss", "tokens_processed"} <= content.keys()


def test_a_signal_stops_at_a_step_saves_and_resumes(tmp_path: Path, unbroken: Path, data: list[str]) -> None:
    flags = [*data, *SHAPE, *SCHEDULE, "--total-steps", 2000, "--output-dir", tmp_path]
    process = start(2, *flags)
    wait_for_lines(tmp_path, 8, process)
    process.send_signal(signal.SIGTERM)
    finished = wait(process)
    stand = status(tmp_path)
    assert stand["state"] == "stopped", finished.stderr
    step = stand["step"]
    assert checkpoint(tmp_path, step).exists()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, step + 1))


def test_stop_of_a_single_process_exits_with_75(tmp_path: Path, data: list[str]) -> None:
    process = start(1, *data, *SHAPE, *SCHEDULE, "--total-steps", 5000, "--output-dir", tmp_path)
    wait_for_lines(tmp_path, 5, process)
    process.send_signal(signal.SIGINT)
    assert wait(process).code == 75


def fixture_corpus(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Shards whose windows after the fixture's position are its batches: a document per sequence."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{i}>": i for i in range(facts["config"]["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<1>")
    tokenizer.save_pretrained(folder / "tokenizer")
    sequences = [sequence for batch in facts["token_batches"] for sequence in batch]
    texts = [" ".join(f"<{token}>" for token in sequence) for sequence in sequences]
    used = ["<5> " * 100] * 8  # rows 0 to 7, of which row 7 chunk 2 was the last one used
    pq.write_table(pa.table({"text": ["<4> <4> <4>"]}), folder / "000_00000.parquet")
    pq.write_table(pa.table({"text": used + texts}), folder / "000_00001.parquet")
    config = folder / "config.json"
    config.write_text(json.dumps(facts["config"]))
    return [
        "--tokenizer-path", str(folder / "tokenizer"), "--data-glob", str(folder / "*.parquet"),
        "--no-packing", "--model-config", str(config), "--batch-size", "2", "--block-size", "32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "processes"),
    [
        (25, 2),
        (40, 1),
        pytest.param(25, 1, marks=pytest.mark.slow),
        pytest.param(40, 2, marks=pytest.mark.slow),
        pytest.param(40, 4, marks=pytest.mark.slow),
    ],
)
def test_pipeline_checkpoints_go_on_with_their_losses(tmp_path: Path, step: int, processes: int) -> None:
    name = f"streaming_checkpoint_step_{step}"
    facts = json.loads((FIXTURES / f"{name}.json").read_text())
    schedule = facts["schedule"]
    steps = len(facts["continuation"])
    flags = fixture_corpus(tmp_path, facts)
    process = start(
        processes, *flags, "--checkpoint-path", FIXTURES / f"{name}.pth", "--output-dir", tmp_path / "run",
        "--learning-rate", schedule["base_lr"], "--min-learning-rate", schedule["min_lr"],
        "--warmup-steps", schedule["warmup_steps"], "--total-steps", schedule["max_steps"],
    )  # fmt: skip
    wait_for_lines(tmp_path / "run", steps, process)
    process.send_signal(signal.SIGTERM)
    wait(process)
    lines = metrics(tmp_path / "run")[:steps]
    assert [line["step"] - 1 for line in lines] == [entry["step"] for entry in facts["continuation"]]
    for line, expected in zip(lines, facts["continuation"], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-4)
        assert line["lr"] == pytest.approx(expected["lr"], rel=1e-6)
    first_tokens = facts["tokens_processed"] + 2 * 32
    assert lines[0]["tokens_processed"] == first_tokens


def start_by_hand(rank: int, world_size: int, port: int, flags: list[Any]) -> subprocess.Popen[str]:
    """A process of a manual launch: the second half of the ranks says its local rank by flag."""
    by_hand = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    if rank < world_size // 2:
        by_hand["LOCAL_RANK"] = str(rank)
    else:
        flags = [*flags, f"--local-rank={rank}"]
    return subprocess.Popen(
        command(1, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **by_hand},
    )


@pytest.mark.slow
def test_a_launch_by_hand_is_torchruns(tmp_path: Path, unbroken: Path, data: list[str]) -> None:
    with socket.socket() as trial:
        trial.bind(("localhost", 0))
        port = trial.getsockname()[1]
    flags = [*data, *SHAPE, *SCHEDULE, "--total-steps", 12, "--output-dir", tmp_path]
    processes = [start_by_hand(rank, 2, port, flags) for rank in range(2)]
    done = [wait(process) for process in processes]
    assert [finished.code for finished in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[1].stdout == ""
    same = ("loss", "grad_norm", "stream_hash")
    for mine, theirs in zip(metrics(tmp_path), metrics(unbroken), strict=True):
        assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}


@pytest.mark.slow
def test_not_streaming_is_the_same_for_any_split_and_goes_on(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--model-config", "argonne-tiny", "--block-size", 64, *SCHEDULE, "--no-streaming"]
    whole = [*flags, "--batch-size", 2, "--total-steps", 12, "--output-dir", tmp_path / "whole"]
    finished = launch(1, *whole)
    assert finished.code == 0, finished.stderr
    parts = [*flags, "--batch-size", 1, "--total-steps", 12, "--output-dir", tmp_path / "parts"]
    process = start(1, *parts, "--gradient-accumulation-steps", 2, "--max-run-time", "1h")
    wait_for_lines(tmp_path / "parts", 4, process)
    process.send_signal(signal.SIGTERM)
    wait(process)
    assert 4 <= status(tmp_path / "parts")["step"] <= 12
    finished = launch(2, *parts, "--tensor-parallel-size", 1)
    assert finished.code == 0, finished.stderr
    lines = metrics(tmp_path / "parts")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for mine, theirs in zip(lines, metrics(tmp_path / "whole"), strict=True):
        assert mine["stream_hash"] == theirs["stream_hash"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)


@pytest.mark.slow
def test_a_finished_run_exports_itself(tmp_path: Path, data: list[str]) -> None:
    from transformers import AutoTokenizer

    export = tmp_path / "export"
    flags = [*data, *SHAPE, *SCHEDULE, "--total-steps", 6, "--output-dir", tmp_path / "run"]
    finished = launch(2, *flags, "--final-model-dir", export)
    assert finished.code == 0, finished.stderr
    model = ArgonneModel.from_pretrained(export)
    saved = torch.load(checkpoint(tmp_path / "run", 6), weights_only=True)["model_state_dict"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.float(), saved[name].to(weight.dtype).float()), name
    assert len(AutoTokenizer.from_pretrained(export)) <= model.config.vocab_size


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (["--checkpoint-path", "nowhere/step_5.pth"], 1, "nowhere/step_5.pth"),
        (["--data-glob", "nowhere/*.parquet"], 1, "--data-glob"),
        (["--tokenizer-path", "nowhere"], 1, "--tokenizer-path"),
        (["--text-column", "body"], 1, "--text-column"),
    ],
)
def test_what_is_not_there_stops_the_run_in_a_line(
    tmp_path: Path, data: list[str], change: list[str], code: int, told: str
) -> None:
    finished = launch(1, *data, *SHAPE, "--output-dir", tmp_path, *change)
    assert finished.code == code
    assert len(finished.errors()) == 1 and told in finished.errors()[0], finished.stderr
    assert "Traceback" not in finished.stderr
    assert status(tmp_path)["state"] == "failed"
    assert not OutputFolder(tmp_path).run_config.exists()  # a refused start leaves that of the run before
