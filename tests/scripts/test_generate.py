"""scripts/generate.py: the text of a plain greedy `generate`, from any file, alone and split over ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import generate
import pytest
import torch
from transformers import AutoTokenizer

from argonne.testing.corpus import build_tokenizer
from argonne.testing.launch import ROOT, environment
from model import ArgonneConfig, ArgonneModel

CONFIG: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 90, "max_position_embeddings": 64,
}  # fmt: skip
PROMPT = "import os"
SCRIPT = ROOT / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a pipeline checkpoint, an export, a config and a tokenizer; and the greedy text."""
    folder = tmp_path_factory.mktemp("generate")
    build_tokenizer(folder / "tokenizer", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    model = ArgonneModel(ArgonneConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # decided logits, so that rounding cannot turn the choice
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}
    torch.save({"model_state_dict": weights, "global_step": 3}, folder / "streaming_checkpoint_step_3.pth")
    model.save_pretrained(folder / "export")
    tokenizer.save_pretrained(folder / "export")
    ids = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    eos = tokenizer.eos_token_id
    out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)  # type: ignore[assignment]
    return folder, text


def arguments(folder: Path, source: str) -> list[str]:
    shared = ["--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "0"]
    if source == "export":
        return ["--checkpoint-path", str(folder / "export"), *shared]
    return [
        "--checkpoint-path", str(folder / "streaming_checkpoint_step_3.pth"),
        "--tokenizer-path", str(folder / "tokenizer"), "--model-config", str(folder / "config.json"), *shared,
    ]  # fmt: skip


@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_alone(made: tuple[Path, str], capsys: pytest.CaptureFixture[str], source: str) -> None:
    folder, expected = made
    assert generate.main(arguments(folder, source)) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected


@pytest.mark.slow
@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_split_over_two_processes(made: tuple[Path, str], source: str) -> None:
    folder, expected = made
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), *arguments(folder, source)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == expected


def test_seeded_sampling_repeats(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    sampled = [*arguments(made[0], "export"), "--temperature", "1.0"]
    texts = []
    for seed in ("1", "1", "2"):
        assert generate.main([*sampled, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_mistakes_are_one_line(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = made[0]
    file = str(folder / "streaming_checkpoint_step_3.pth")
    for wrong, code, told in (
        (["--checkpoint-path", file], 2, "--tokenizer-path is required"),
        (["--checkpoint-path", str(folder / "export"), "--temperature", "-1"], 2, "--temperature -1"),
        (["--checkpoint-path", str(folder / "nothing.pth"), "--tokenizer-path", "x"], 1, "nothing.pth"),
    ):
        assert generate.main(wrong) == code, told
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1, error
        assert "--" in error
