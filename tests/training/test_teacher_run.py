"""Runs beside a teacher: every placement teaches alike, a resume is exact, mistakes are one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from argonne.config.distillation import DistillationOptions, check_folder
from argonne.errors import ConfigError
from argonne.testing.corpus import PATTERN, small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, checkpoint, environment, launch, metrics
from argonne.tools.bpe_trainer import train_tokenizer
from argonne.training.teacher import check_head, check_tokenizer
from argonne.training.teacher_plan import teacher_cost
from argonne.training.teacher_weights import split_model
from data_stream import load_tokenizer
from tests import ROOT
from tp_shard import Layout, SimulatedTPGroup

ALPHA = 0.3
FALCON: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
Data = tuple[list[str], Path, Path]
Lines = list[dict[str, Any]]


def llama(folder: Path, vocab_size: int, tokenizer: Path | None = None) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            if file.name != "config.json":
                shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Flags of a run, a teacher whose vocabulary is padded, and the tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    glob, tokenizer, _ = small_corpus(folder, documents=60, length=600)
    teacher = llama(folder / "teacher", 520, tokenizer)
    flags = ["--tokenizer-path", str(tokenizer), "--data-glob", glob, "--total-steps", "6", *SHAPE, *SCHEDULE]
    return flags, teacher, tokenizer


def taught(teacher: Path, *flags: str) -> list[str]:
    return [
        "--teacher-path",
        str(teacher),
        "--distill-alpha",
        str(ALPHA),
        "--distill-temperature",
        "2",
        *flags,
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Lines:
    output = tmp_path_factory.mktemp("alone")
    finished = launch(1, *data[0], *taught(data[1]), "--output-dir", output)
    assert finished.code == 0, finished.stderr
    assert "Teacher" in finished.stdout and "forward divergence at temperature 2" in finished.stdout
    return metrics(output)


def test_the_loss_is_the_weighted_sum(alone: Lines) -> None:
    assert len(alone) == 6
    for line in alone:
        assert line["loss"] == pytest.approx(
            ALPHA * line["ce_loss"] + (1 - ALPHA) * line["kd_loss"], rel=1e-6
        )
        assert line["kd_loss"] > 0


@pytest.mark.slow
def test_a_resume_goes_on_bit_for_bit(tmp_path: Path, alone: Lines, data: Data) -> None:
    common = [*data[0], *taught(data[1]), "--output-dir", str(tmp_path), "--checkpoint-interval", "3"]
    whole = launch(1, *common)
    assert whole.code == 0, whole.stderr
    checkpoint(tmp_path, 6).unlink()
    resumed = launch(1, *common)
    assert resumed.code == 0, resumed.stderr
    keys = ("step", "loss", "ce_loss", "kd_loss", "grad_norm")
    found = [[line[key] for key in keys] for line in metrics(tmp_path)]
    assert found == [[line[key] for key in keys] for line in alone]
    without = launch(1, *data[0], "--output-dir", tmp_path, "--total-steps", "7")
    assert "--teacher-path was " in without.stdout and "is none" in without.stdout


REPLICAS = ["--tensor-parallel-size", "2", "--batch-size", "1"]
PLACEMENTS = [
    (2, ["--sequence-parallel"]),
    (2, ["--teacher-device-map", "cpu", "--loss-chunk-tokens", "0"]),
    (2, ["--teacher-device-map", "auto"]),
    (4, ["--teacher-device-map", "auto", *REPLICAS]),
    (2, ["--tensor-parallel-size", "1", "--batch-size", "1", "--activation-checkpointing", "full"]),
    (4, ["--teacher-device-map", "tensor-parallel", *REPLICAS]),
    (2, ["--teacher-device-map", "tensor-parallel", "--compile"]),
    (2, ["--teacher-device-map", "tensor-parallel", "--pad-widths", "on"]),
]


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ["--teacher-device-map", "tensor-parallel"]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in PLACEMENTS),
    ],
)
def test_every_placement_teaches_alike(
    tmp_path: Path,
    alone: Lines,
    data: Data,
    processes: int,
    flags: list[str],
) -> None:
    finished = launch(processes, *data[0], *taught(data[1], *flags), "--output-dir", tmp_path)
    assert finished.code == 0, finished.stderr
    for line, expected in zip(metrics(tmp_path), alone, strict=True):
        for key in ("loss", "ce_loss", "kd_loss"):
            assert line[key] == pytest.approx(expected[key], rel=3e-5), (line["step"], key)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=3e-4)
        assert line["stream_hash"] == expected["stream_hash"]


@pytest.mark.slow
def test_a_folder_that_cannot_teach_is_one_line(tmp_path: Path, data: Data) -> None:
    flags, *_ = data
    small = llama(tmp_path / "small", 300)
    finished = launch(2, *flags, *taught(small), "--output-dir", tmp_path / "a")
    assert finished.code == 1 and len(finished.errors()) == 1, finished.stderr
    assert "has a vocabulary of 300, the student" in finished.errors()[0]


def test_what_a_teacher_must_be(tmp_path: Path, data: Data) -> None:
    _, teacher, tokenizer = data
    with pytest.raises(ConfigError, match=r"--teacher-path \S+/nowhere is no folder"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_folder(tmp_path)
    ours = load_tokenizer(str(tokenizer), False)
    check_tokenizer(teacher, ours, str(tokenizer), False)
    check_tokenizer(tmp_path, ours, str(tokenizer), False)  # it brings none
    other = train_tokenizer(["zzz qqq " * 50], tmp_path / "other", vocab_size=300, pattern=PATTERN)
    with pytest.raises(ConfigError, match=r"has another tokenizer: id \d+ is '.+' to it and '.+' to --tok"):
        check_tokenizer(other, ours, str(tokenizer), False)
    LlamaForCausalLM(LlamaConfig(**FALCON)).save_pretrained(tmp_path / "falcon")
    config = json.loads((tmp_path / "falcon" / "config.json").read_text())
    (tmp_path / "falcon" / "config.json").write_text(json.dumps(config | {"model_type": "falcon"}))
    with pytest.raises(ConfigError, match="is a falcon, for which there is no tensor-parallel plan"):
        split_model(tmp_path / "falcon", torch.float32, torch.device("cpu"), SimulatedTPGroup.create(1)[0])


def test_a_head_that_does_more_is_refused_unless_it_is_known() -> None:
    gemma = Gemma2ForCausalLM(Gemma2Config(**FALCON, head_dim=16, final_logit_softcapping=5.0))
    with torch.no_grad():
        gemma.lm_head.weight.mul_(50.0)
    check_head(gemma, Path("gemma"))
    gemma.config.final_logit_softcapping = None
    kept = gemma.lm_head.forward
    gemma.lm_head.forward = lambda x: torch.tanh(kept(x))
    with pytest.raises(ConfigError, match="are not its head's product in a way that is known"):
        check_head(gemma, Path("gemma"))


def test_the_plan_counts_the_teacher(tmp_path: Path) -> None:
    teacher = llama(tmp_path / "teacher", 520)
    count = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(teacher).parameters())
    layout = Layout(tp_size=2, batch_size=2, block_size=64, element_bytes=4)
    costs = {}
    for placed in ("local", "tensor-parallel", "cpu"):
        options = DistillationOptions(teacher_path=str(teacher), teacher_device_map=placed)
        costs[placed] = teacher_cost(options, layout, 512, 8)
    assert {cost.parameters for cost in costs.values()} == {count}
    assert costs["local"].weights == 4 * (count + 256 * 48)
    assert costs["tensor-parallel"].weights == 4 * (-(-count // 2) + 256 * 48)
    assert costs["cpu"].weights == 4 * 256 * 48
    assert costs["local"].flops > costs["tensor-parallel"].flops > 0
    assert teacher_cost(DistillationOptions(), layout, 512, 8).total == 0


@pytest.mark.slow
def test_a_step_is_replayed_with_its_teacher(tmp_path: Path, data: Data) -> None:
    run = tmp_path / "run"
    kept = ["--checkpoint-interval", "3", "--keep-checkpoints", "9"]
    finished = launch(1, *data[0], *taught(data[1]), *kept, "--output-dir", run)
    assert finished.code == 0, finished.stderr
    command = [sys.executable, str(ROOT / "scripts" / "replay_step.py"), str(run), "--step", "5"]
    again = subprocess.run(
        [*command, "--output", str(tmp_path / "page.html")], capture_output=True, text=True, env=environment()
    )
    assert again.returncode == 0, again.stderr
    assert "bit for bit" in again.stdout
