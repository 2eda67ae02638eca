"""Exports: they open outside the repository, are cut into shards, and spare what is not theirs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import export_hf as export_script
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from argonne.checkpoint.export_hf import export_hf, plan_shards, quiet_transformers
from argonne.checkpoint.parts import open_any
from argonne.errors import ConfigError, DataError
from argonne.testing.checkpoint_samples import MODEL_CONFIG, save_sample, unsharded
from argonne.testing.corpus import build_tokenizer
from argonne.tools.bpe_trainer import EOS
from model import ArgonneConfig, ArgonneModel
from tests import FIXTURES
from tests.checkpoint.pipeline_samples import fixture_config


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that fits the sample model's 101 ids."""
    folder = tmp_path_factory.mktemp("small")
    words = Tokenizer(WordLevel({EOS: 0, "a": 1, "b": 2}, unk_token=EOS))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("step", [25, pytest.param(40, marks=pytest.mark.slow)])
def test_an_export_opens_outside_the_repository(tmp_path: Path, tokenizer_folder: Path, step: int) -> None:
    source = FIXTURES / f"streaming_checkpoint_step_{step}.pth"
    config = fixture_config(step)
    exported = tmp_path / "exported"
    with quiet_transformers():
        export_hf(open_any(source), config, str(tokenizer_folder), exported, dtype=torch.float32)
    program = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True).eval()
tokens = torch.arange(20).reshape(2, 10)
tokenizer = AutoTokenizer.from_pretrained({str(exported)!r})
assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
model.generate(tokens, max_new_tokens=3, do_sample=False)
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, "logits.pt")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    model = ArgonneModel(ArgonneConfig(**config)).eval()
    weights = torch.load(source, weights_only=True)["model_state_dict"]
    model.load_state_dict(
        {name.removeprefix("_orig_mod."): weight.float() for name, weight in weights.items()}
    )
    with torch.no_grad():
        expected = model(input_ids=torch.arange(20).reshape(2, 10)).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_a_large_export_is_cut_into_shards(
    tmp_path: Path, small_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "argonne.checkpoint.export_hf.plan_shards", lambda sizes: plan_shards(sizes, limit=8000)
    )
    path, _ = save_sample(tmp_path)
    reader = open_any(path)
    folder = tmp_path / "exported"
    config = {**MODEL_CONFIG, "tie_word_embeddings": True, "vocab_size": 101}
    with quiet_transformers():
        export_hf(reader, config, str(small_tokenizer), folder, dtype=torch.float32)
        assert len(list(folder.glob("model-*.safetensors"))) > 3
        model = ArgonneModel.from_pretrained(folder)
        export_hf(reader, config, str(small_tokenizer), folder)  # an earlier export is replaced
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, unsharded(name, "param"))
    assert plan_shards({"a": 5, "b": 6, "c": 3, "d": 20, "e": 1}, 10) == [["a"], ["b", "c"], ["d"], ["e"]]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["exported", path.name]


def test_an_export_never_touches_a_foreign_folder(tmp_path: Path, small_tokenizer: Path) -> None:
    path, _ = save_sample(tmp_path / "in")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="foreign is not empty"):
        export_hf(open_any(path), MODEL_CONFIG, str(small_tokenizer), foreign)
    with pytest.raises(DataError, match="--tokenizer-path"):
        export_hf(open_any(path), MODEL_CONFIG, str(tmp_path / "nowhere"), tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["foreign", "in"]
    assert os.listdir(foreign) == ["thesis.tex"]


def test_export_script(tmp_path: Path, small_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sample(tmp_path / "in")
    arguments = [
        "--checkpoint-path",
        str(tmp_path / "in"),
        "--tokenizer-path",
        str(small_tokenizer),
        "--output-dir",
    ]
    assert export_script.main([*arguments, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    capsys.readouterr()
    assert export_script.main([*arguments, str(tmp_path / "tiny"), "--model-config", "argonne-tiny"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: checkpoint ") and len(told.splitlines()) == 1
    assert "hidden_size is 24 in the checkpoint and 128 in --model-config" in told
    arguments[1] = "NONE"
    assert export_script.main([*arguments, str(tmp_path / "none")]) == 2


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    path, _ = save_sample(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"has 300 tokens and the model a vocabulary of 101"):
        export_hf(open_any(path), MODEL_CONFIG, str(tokenizer_folder), tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(tokenizer_folder, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="--tokenizer-path"):
        export_hf(open_any(path), MODEL_CONFIG, str(broken), tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["broken", "in"]
