"""Names, shapes and first values of the model's parameters; files, meta device and exported code."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from argonne.testing.models import relative_error
from model import ArgonneConfig, ArgonneModel, initial_std
from tests.model.model_pairs import make_config, make_pair, make_tokens

# ----------------------------------------------------------------------------------------------------------
# Parameters and initial values


def test_parameter_names_and_their_order() -> None:
    def expected(bias: bool) -> list[str]:
        leaves = ("weight", "bias") if bias else ("weight",)
        names = ["embed_tokens.weight"]
        for i in range(2):
            names += [f"blocks.{i}.attn.{p}_proj.{leaf}" for p in "qkvo" for leaf in leaves]
            names += [f"blocks.{i}.input_norm.weight", f"blocks.{i}.post_norm.weight"]
            names += [f"blocks.{i}.mlp.{p}_proj.{leaf}" for p in ("gate", "up", "down") for leaf in leaves]
        return [*names, "norm.weight"]

    for bias in (False, True):
        tied = ArgonneModel(make_config(attention_bias=bias, mlp_bias=bias))
        assert [name for name, _ in tied.named_parameters()] == expected(bias)
        assert list(tied.state_dict()) == [*expected(bias), "lm_head.weight"]
        assert tied.lm_head.weight is tied.embed_tokens.weight
    untied = ArgonneModel(make_config(tie_word_embeddings=False))
    assert [name for name, _ in untied.named_parameters()] == [*expected(False), "lm_head.weight"]
    assert list(untied.buffers()) == []


def test_defaults_are_argonne_2() -> None:
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_918_072_800
    with torch.device("meta"):
        early: Any = ArgonneModel(ArgonneConfig(hidden_size=4096, tie_word_embeddings=False))
    assert early.blocks[0].attn.q_proj.weight.shape == (4080, 4096)
    assert early.blocks[0].attn.o_proj.weight.shape == (4096, 4080)


def test_initial_values_follow_the_rule() -> None:
    config = make_config(
        hidden_size=192, intermediate_size=512, vocab_size=1000, attention_bias=True, mlp_bias=True
    )
    torch.manual_seed(0)
    model = ArgonneModel(config)
    for name, parameter in model.named_parameters():
        std = initial_std(config, name)
        if std is None:
            assert name.endswith("norm.weight") and (parameter == 1).all()
        elif std == 0.0:
            assert name.endswith(".bias") and (parameter == 0).all()
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert std == pytest.approx(192**-0.5 / (2.0 if residual else 1.0))
            assert parameter.std().item() == pytest.approx(std, rel=0.03)
            assert abs(parameter.mean().item()) < std * 0.05


@pytest.mark.parametrize("tie", [True, False])
def test_24_layers_start_near_ln_vocab_plus_a_half(tie: bool) -> None:
    config = make_config(
        vocab_size=4000, hidden_size=192, num_hidden_layers=24, intermediate_size=512, tie_word_embeddings=tie
    )
    torch.manual_seed(0)
    model = ArgonneModel(config)
    tokens = make_tokens(config, batch=4, seq_len=64)
    with torch.no_grad():
        output = model(tokens, labels=tokens)
    assert output.loss.item() == pytest.approx(torch.tensor(4000.0).log().item() + 0.5, abs=0.15)
    assert output.logits.std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 does not divide num_attention_heads 6"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_configurations_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


# ----------------------------------------------------------------------------------------------------------
# Files, meta device, export


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip_through_save_and_from_pretrained(tmp_path: Path, tie: bool) -> None:
    config = make_config(tie_word_embeddings=tie, rope_theta=12345.0)
    model = make_pair(config)[0].eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    loaded, report = from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ArgonneModel
    assert not any(report.values()), report
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tie
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokens = make_tokens(config)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "argonne2" and written["rope_theta"] == 12345.0


def test_missing_weights_are_initialised_by_the_rule(tmp_path: Path) -> None:
    config = make_config(hidden_size=192)
    state = ArgonneModel(config).state_dict()
    state.pop("lm_head.weight")
    state.pop("blocks.1.mlp.down_proj.weight")
    kept = state["blocks.0.mlp.down_proj.weight"]
    model: Any = ArgonneModel.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(model.blocks[0].mlp.down_proj.weight, kept)
    assert model.blocks[1].mlp.down_proj.weight.std().item() == pytest.approx(192**-0.5 / 2, rel=0.05)


@pytest.mark.parametrize("tie", [True, False])
def test_meta_build_then_to_empty_then_load(tie: bool) -> None:
    config = make_config(tie_word_embeddings=tie)
    model = make_pair(config)[0].eval()
    with torch.device("meta"):
        empty = ArgonneModel(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, 131)
    empty.to_empty(device="cpu").eval()
    assert (empty.lm_head.weight is empty.embed_tokens.weight) == tie
    empty.load_state_dict(model.state_dict())
    tokens = make_tokens(config)
    assert torch.equal(empty(tokens).logits, model(tokens).logits)


def test_casts_do_not_degrade_the_rotary_tables() -> None:
    config = make_config()
    model = make_pair(config)[0]
    tokens = make_tokens(config, seq_len=60)
    before = model(tokens).logits
    model.to(torch.bfloat16).to(torch.float32)
    reference = copy.deepcopy(model)
    rounded = ArgonneModel(config)
    rounded.load_state_dict(reference.state_dict())
    assert torch.equal(model(tokens).logits, rounded(tokens).logits)
    assert 0 < relative_error(model(tokens).logits, before) < 0.05


def test_exported_code_loads_outside_this_repository(tmp_path: Path) -> None:
    config = make_config()
    model = make_pair(config)[0].eval()
    config.auto_map = {"AutoConfig": "model.ArgonneConfig", "AutoModelForCausalLM": "model.ArgonneModel"}
    model.save_pretrained(tmp_path / "export")
    source = Path(sys.modules["model"].__file__ or "")
    (tmp_path / "export" / "model.py").write_text(source.read_text())
    tokens = make_tokens(config)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "assert m.__module__.startswith('transformers_modules'), m.__module__\n"
        "torch.save(m(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])\n"
    )
    torch.save(tokens, tmp_path / "tokens.pt")
    arguments = [str(tmp_path / "export"), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path, env=environment, timeout=100
    )
    assert relative_error(torch.load(tmp_path / "logits.pt"), model(tokens).logits) < 1e-6
