"""Exports for the world outside: as Argonne and as Llama, in the run's dtype, with a card of known facts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import export_hf as export_script
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from argonne.checkpoint.export_hf import export_hf, plan_shards, quiet_transformers
from argonne.checkpoint.parts import open_any
from argonne.errors import ConfigError
from argonne.testing.corpus import build_tokenizer
from argonne.testing.models import random_tokens, small_model
from tests.model.family_reference import SWITCHES

LLAMA_LIKE: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False, "num_key_value_heads": 2},
    {"attention_bias": True, "mlp_bias": True, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
]
SHAPE = {"hidden_size": 48, "vocab_size": 310, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


def saved(folder: Path, *, model_dtype: str | None = "torch.float32", **changes: Any) -> tuple[Path, Any]:
    """A checkpoint of a small model, without optimizer state, and the model."""
    model = small_model(torch.float32, **{**SHAPE, **changes}).eval()
    keys = {"model_type", "architectures", "dtype", "transformers_version"}
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in keys}
    content = {
        "global_step": 1200,
        "tokens_processed": 4_915_200,
        "loss": 2.25,
        "model_state_dict": model.state_dict(),
        "model_config": config,
        "model_dtype": model_dtype,
        "data_state": {"manifest": {"names": ["a.parquet", "b.parquet"]}, "block_size": 64},
    }
    path = folder / "streaming_checkpoint_step_1200.pth"
    folder.mkdir(exist_ok=True)
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path, model


def exported(path: Path, model: Any, tokenizer: Path, target: Path, **how: Any) -> Path:
    with quiet_transformers():
        return export_hf(open_any(path), model.config.to_dict(), str(tokenizer), target, **how)


@pytest.mark.parametrize("changes", LLAMA_LIKE)
def test_as_llama_it_opens_strictly_with_the_same_logits(
    tmp_path: Path, tokenizer_folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.checkpoint.export_hf.plan_shards", lambda sizes: plan_shards(sizes, 60_000))
    path, model = saved(tmp_path / "in", **changes)
    folder = exported(path, model, tokenizer_folder, tmp_path / "llama", form="llama")
    assert not (folder / "modeling_argonne.py").exists() and len(list(folder.glob("*.safetensors"))) > 2
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    llama, info = opened
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert not any(info.values()), info
    tokens = random_tokens(310, length=40)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    with torch.no_grad():
        assert torch.equal(llama(tokens).logits, model(tokens).logits)
        assert torch.equal(
            llama(tokens, attention_mask=mask).logits, model(tokens, attention_mask=mask).logits
        )
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(llama.generate(tokens, **how), model.generate(tokens, **how))
    assert llama.config.tie_word_embeddings == model.config.tie_word_embeddings
    again = exported(
        path, model, tokenizer_folder, folder, form="argonne"
    )  # replaces what a card says is ours
    assert (again / "modeling_argonne.py").exists()


@pytest.mark.parametrize(
    "switch", ["qk_norm", "v_norm", "sandwich_norm", "logit_softcap", "interleaved_local_attention"]
)
def test_a_switch_in_the_way_of_llama_is_named(tmp_path: Path, tokenizer_folder: Path, switch: str) -> None:
    changes = {switch: SWITCHES[switch], "local_attention_window": 3}
    path, model = saved(tmp_path / "in", **changes)
    with pytest.raises(ConfigError, match=f"--as llama: .*{switch}"):
        exported(path, model, tokenizer_folder, tmp_path / "out", form="llama")
    path, model = saved(tmp_path / "in", hidden_size=50)
    with pytest.raises(ConfigError, match="hidden_size 50"):
        exported(path, model, tokenizer_folder, tmp_path / "out", form="llama")
    assert [child.name for child in tmp_path.iterdir()] == ["in"]


def test_z_loss_is_no_part_of_the_logits(tmp_path: Path, tokenizer_folder: Path) -> None:
    path, model = saved(tmp_path / "in", z_loss_weight=0.1)
    exported(path, model, tokenizer_folder, tmp_path / "out", form="llama")


def test_every_class_opens_an_export_of_the_whole_family(tmp_path: Path, tokenizer_folder: Path) -> None:
    path, model = saved(tmp_path / "in", **SWITCHES)
    folder = exported(path, model, tokenizer_folder, tmp_path / "argonne")
    program = f"""
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = {str(folder)!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.qk_norm and config.logit_softcap == 2.0 and config.eos_token_id is not None
AutoModel.from_pretrained(folder, trust_remote_code=True)
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
model.gradient_checkpointing_enable()
model.eval()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
batch = tokenizer(["def", "import os and sys, then"], return_tensors="pt", padding=True)
text = model.generate(**batch, max_new_tokens=5, do_sample=False)
alone = tokenizer(["def"], return_tensors="pt")
assert torch.equal(model.generate(**alone, max_new_tokens=5, do_sample=False)[0, -5:], text[0, -5:])
torch.save(model(torch.arange(40).reshape(2, 20)).logits, "logits.pt")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    with torch.no_grad():
        expected = model(torch.arange(40).reshape(2, 20)).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


@pytest.mark.parametrize(
    ("model_dtype", "flag", "expected"),
    [
        ("torch.float32", [], "float32"),
        ("torch.bfloat16", [], "bfloat16"),
        ("torch.float16", [], "float16"),
        (None, [], "float32"),
        ("torch.float32", ["--dtype", "bf16"], "bfloat16"),
    ],
)
def test_the_weights_are_in_the_runs_dtype(
    tmp_path: Path, tokenizer_folder: Path, model_dtype: str | None, flag: list[str], expected: str
) -> None:
    path, model = saved(tmp_path / "in", model_dtype=model_dtype)
    arguments = ["--checkpoint-path", str(path), "--tokenizer-path", str(tokenizer_folder)]
    assert export_script.main([*arguments, "--output-dir", str(tmp_path / "out"), *flag]) == 0
    opened: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(opened.dtype) == f"torch.{expected}"
    for name, weight in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight.to(opened.dtype)), name


def test_the_card_says_what_the_checkpoint_says(tmp_path: Path, tokenizer_folder: Path) -> None:
    path, model = saved(tmp_path / "in", logit_softcap=15.0)
    card = (exported(path, model, tokenizer_folder, tmp_path / "out") / "README.md").read_text()
    for fact in (
        "1,200",
        "4,915,200",
        "2.2500 nats",
        "`a.parquet`, `b.parquet`",
        "| `logit_softcap` | 15.0 |",
    ):
        assert fact in card
    assert f"| Parameters | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert "trust_remote_code=True" in card and card.startswith("---\n")
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "bare.pth")
    card = (
        exported(tmp_path / "bare.pth", model, tokenizer_folder, tmp_path / "bare") / "README.md"
    ).read_text()
    for unknown in ("Optimizer steps", "Tokens seen", "Loss", "Data", "Seed", "None |"):
        assert f"| {unknown}" not in card


def test_the_command_as_llama(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = saved(tmp_path / "in")
    arguments = ["--checkpoint-path", str(path), "--tokenizer-path", str(tokenizer_folder), "--as", "llama"]
    assert export_script.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    assert "as llama, torch.float32" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id is not None
    path, _ = saved(tmp_path / "in", qk_norm=True)
    assert export_script.main([*arguments, "--output-dir", str(tmp_path / "other")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --as llama: ") and "qk_norm" in told and len(told.splitlines()) == 1
