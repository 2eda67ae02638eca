"""scripts/evaluate.py: tasks from held-out text; against lm-eval itself where it is installed."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.errors import DataError
from argonne.testing.corpus import build_tokenizer, short_texts, write_shards
from argonne.testing.models import small_model
from argonne.tools.held_out_tasks import CHOICES, continuation_questions, held_out_tasks, read_documents
from tests import ROOT
from tests.model.family_reference import SWITCHES

PROGRAM = ROOT / "scripts" / "evaluate.py"


def main(flags: list[str]) -> int:
    """The command in this process, under another name: lm-eval imports a package named evaluate."""
    spec = importlib.util.spec_from_file_location("evaluate_command", PROGRAM)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
        return int(module.main(flags))
    finally:
        sys.path[:] = path


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", ["one", None, "  ", "two", "three"], shards=2)
    assert read_documents(str(tmp_path / "data" / "*.parquet"), "text", 2) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "b.txt").write_text("whole file")
    assert read_documents(str(tmp_path / "[ab].*"), "text", 9) == ["x", "y", "whole file"]
    for pattern, column, named in (
        (str(tmp_path / "none*"), "text", "matches no file"),
        (str(tmp_path / "data" / "*.parquet"), "body", "takes one of text, id"),
        (str(tmp_path / "a.jsonl"), "body", "--text-column"),
    ):
        with pytest.raises(DataError, match=named):
            read_documents(pattern, column, 5)
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_documents(str(tmp_path / "a.jsonl"), "text", 5)


def test_the_true_continuation_is_among_the_choices_at_its_label() -> None:
    texts = short_texts(9, 300)
    questions = continuation_questions(texts)
    assert len(questions) == 9
    for text, question in zip(texts, questions, strict=True):
        assert len(set(question["choices"])) == CHOICES
        assert text.startswith(question["context"] + question["choices"][question["label"]])
    assert len({question["label"] for question in questions}) == CHOICES
    assert continuation_questions(["short"] * 9) == []
    assert [task["task"] for task in held_out_tasks(["short"] * 9)] == ["held_out_text"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tokenizer-path", "t"], "give --text GLOB, --tasks NAMES"),
        (["--text", "x", "--documents", "0", "--tokenizer-path", "t"], "--documents 0"),
        (["--text", "x"], "--tokenizer-path is required"),
        (["--text", "x", "--tokenizer-path", "t", "--batch-size", "few"], "--batch-size few"),
    ],
)
def test_wrong_flags(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint-path", "nowhere", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and named in told and len(told.splitlines()) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A checkpoint of a small model with every switch, its tokenizer, and the model."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = build_tokenizer(folder / "tokenizer", vocab_size=300)
    model = small_model(torch.float32, vocab_size=300, max_position_embeddings=512, **SWITCHES).eval()
    keys = {"model_type", "architectures", "dtype", "transformers_version"}
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in keys}
    content = {"global_step": 5, "model_state_dict": model.state_dict(), "model_config": config}
    torch.save(content, folder / "streaming_checkpoint_step_5.pth")
    return folder / "streaming_checkpoint_step_5.pth", tokenizer, model


def bits_per_byte(model: Any, tokenizer: Any, documents: list[str]) -> float:
    """Of whole documents, each after an end of text."""
    nats = 0.0
    for text in documents:
        ids = torch.tensor(
            [[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
        )
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in documents)


def test_a_checkpoint_against_lm_eval(tmp_path: Path, trained: tuple[Path, Path, Any]) -> None:
    pytest.importorskip("lm_eval")
    from transformers import AutoTokenizer

    path, tokenizer, model = trained
    documents = short_texts(6, 300)
    write_shards(tmp_path / "data", documents, shards=1)
    output = tmp_path / "results.json"
    flags = ["--checkpoint-path", str(path), "--tokenizer-path", str(tokenizer), "--device", "cpu"]
    flags += ["--text", str(tmp_path / "data" / "*.parquet"), "--output", str(output)]
    ended = subprocess.run([sys.executable, str(PROGRAM), *flags], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "held_out_text" in ended.stdout
    results = json.loads(output.read_text())
    expected = bits_per_byte(model, AutoTokenizer.from_pretrained(tokenizer), documents)
    assert results["held_out_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
    assert 0 <= results["held_out_continuation"]["acc,none"] <= 1


def test_without_lm_eval_a_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    flags = ["--checkpoint-path", str(tmp_path), "--tokenizer-path", "t", "--text", "x"]
    assert main(flags) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: lm-eval is not there") and "pip install" in told
