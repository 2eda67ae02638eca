"""The model against transformers' Llama: logits, loss, every gradient, generation, files, precision."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_reference import copy_weights, llama_gradients, llama_like, llama_parameters, relative_error, widen
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from model import (
    ArgonneConfig,
    ArgonneModel,
    ArgonneRMSNorm,
    _RMSNormFunction,
    _SwiGLUFunction,
    apply_rotary,
    causal_lm_loss,
    initial_std,
    rotary_frequencies,
    rotary_tables,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
}

# Hidden 64 over 6 heads gives head_dim 10: q maps 64 -> 60, as in the 4096-wide checkpoints 4096 -> 4080.
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "narrow-q-untied": {"hidden_size": 64, "tie_word_embeddings": False},
    "narrow-q-biases": {"hidden_size": 64, "attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 6},
    "wide-heads": {"head_dim": 16},
}


def make_config(**changes: Any) -> ArgonneConfig:
    return ArgonneConfig(**{**SHAPE, **changes})


def make_pair(config: ArgonneConfig, attention: str = "sdpa", seed: int = 0) -> tuple[Any, Any]:
    """ArgonneModel and LlamaForCausalLM with the same weights, none of them at a tell-nothing one or zero."""
    torch.manual_seed(seed)
    model = ArgonneModel._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    llama = llama_like(config, attention=attention)
    copy_weights(model, llama)
    return model, llama


def make_tokens(config: ArgonneConfig, batch: int = 3, seq_len: int = 19, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, seq_len), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Per parameter; a gradient that is zero in theory (the key bias) is compared with the global norm."""
    assert list(actual) == list(expected)
    global_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in actual.items():
        scale = global_norm if name.endswith("k_proj.bias") else expected[name].norm()
        error = ((gradient - expected[name]).norm() / scale).item()
        assert error <= tolerance, f"{name}: {error:.2e}"


# ----------------------------------------------------------------------------------------------------------
# Agreement with Llama


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_llamas(variant: str, attention: str) -> None:
    config = make_config(**VARIANTS[variant])
    model, llama = make_pair(config, attention)
    tokens = make_tokens(config)
    ours, theirs = model(tokens, labels=tokens), llama(tokens, labels=tokens)
    assert relative_error(ours.logits, theirs.logits) < 1e-5
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), llama_gradients(model, llama), 1e-5)


@pytest.mark.parametrize("variant", ["tied", "narrow-q-untied", "biases"])
def test_float64_agrees_far_below_float32_rounding(variant: str) -> None:
    config = make_config(**VARIANTS[variant])
    model, llama = make_pair(config)
    model, llama = model.double(), widen(llama)
    tokens = make_tokens(config)
    ours, theirs = model(tokens, labels=tokens), llama(tokens, labels=tokens)
    assert ours.loss.dtype == torch.float64
    assert relative_error(ours.logits, theirs.logits) < 1e-13
    assert abs(ours.loss.item() - theirs.loss.item()) < 1e-13
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), llama_gradients(model, llama), 1e-12)


def test_float64_eager_equals_float64_sdpa() -> None:
    config = make_config()
    model = make_pair(config)[0].double()
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    tokens = make_tokens(config)
    for each in (model, other):
        each(tokens, labels=tokens).loss.backward()
    assert_same_gradients(gradients(other), gradients(model), 1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_mask_agrees_with_llama(attention: str, side: str) -> None:
    config = make_config()
    model, llama = make_pair(config, attention)
    tokens = make_tokens(config)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 4, 9)):
        if padding:
            mask[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    if side == "left":
        inputs["position_ids"] = position_ids
    ours, theirs = model(tokens, **inputs), llama(tokens, **inputs)
    real = mask.bool()
    assert relative_error(ours.logits[real], theirs.logits[real]) < 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), llama_gradients(model, llama), 1e-5)
    unmasked = model(tokens).logits
    assert (relative_error(unmasked[real], ours.logits[real]) > 1e-2) == (side == "left")


@pytest.mark.parametrize("tie", [True, False])
def test_ten_adamw_steps_agree_with_llama(tie: bool) -> None:
    config = make_config(tie_word_embeddings=tie)
    model, llama = make_pair(config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses: list[list[float]] = []
    for each in (model, llama):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3, weight_decay=0.1)
        losses.append([])
        for step in range(10):
            tokens = make_tokens(config, seed=step)
            loss = each(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=3e-5)
    pairs = zip(model.named_parameters(), llama_parameters(model, llama).values(), before, strict=True)
    for (name, parameter), reference, start in pairs:
        assert relative_error(parameter, reference) < 2e-3, name
        assert relative_error(parameter, start) > 3e-3, f"{name} hardly moved"


def test_positions_beyond_max_position_embeddings_work() -> None:
    config = make_config(max_position_embeddings=8)
    model, llama = make_pair(config)
    tokens = make_tokens(config, seq_len=100)
    assert relative_error(model(tokens).logits, llama(tokens).logits) < 1e-5
    shifted = torch.arange(5000, 5100)[None]
    ours, theirs = model(tokens, position_ids=shifted).logits, llama(tokens, position_ids=shifted).logits
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_and_masks_come_from_input_ids_not_from_the_embedding(attention: str) -> None:
    """With sequence parallelism the embedding returns a slice, and each attention gathers the whole."""
    config = make_config()
    model = make_pair(config, attention)[0]
    tokens = make_tokens(config, seq_len=12)
    expected = model(tokens[:, :6].repeat(1, 2)).logits[:, :6]
    embed = model.embed_tokens.forward
    model.embed_tokens.forward = lambda ids: embed(ids)[:, :6]
    for block in model.blocks:
        qkv, o_proj = block.attn.qkv, block.attn.o_proj.forward
        block.attn.qkv = lambda x, qkv=qkv: qkv(x.repeat(1, 2, 1))
        block.attn.o_proj.forward = lambda x, o_proj=o_proj: o_proj(x)[:, :6]
    assert relative_error(model(tokens).logits, expected) < 1e-6


def test_head_counts_are_read_from_the_attention_modules() -> None:
    """Half the heads with half the weights give the first half's share, as on one rank of two."""
    config = make_config()
    attention = make_pair(config)[0].blocks[0].attn
    x = torch.randn(2, 9, 60, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(rotary_frequencies(config), torch.arange(9)[None], x.dtype)
    whole = attention(x, tables)
    shares = []
    for rank in range(2):
        local = copy.deepcopy(attention)
        local.num_heads, local.num_kv_heads, local.num_key_value_groups = 3, 1, 3
        for name, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            projection = getattr(local, name)
            projection.weight = nn.Parameter(projection.weight.chunk(2, dim)[rank])
        shares.append(local(x, tables))
    assert relative_error(shares[0] + shares[1], whole) < 1e-6
    assert relative_error(shares[0], whole) > 0.1


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
# Loss


def test_labels_are_shifted_once() -> None:
    config = make_config()
    model = make_pair(config)[0]
    tokens = make_tokens(config)
    output = model(tokens, labels=tokens)
    by_hand = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    twice = F.cross_entropy(output.logits[:, :-2].flatten(0, 1), tokens[:, 2:].flatten())
    assert output.loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert abs(output.loss.item() - twice.item()) > 1e-3
    shifted = model(tokens[:, :-1], shift_labels=tokens[:, 1:])
    assert shifted.loss.item() == pytest.approx(by_hand.item(), abs=1e-5)


def test_loss_ignores_minus_100_and_counts_items_as_transformers_does() -> None:
    config = make_config()
    model, llama = make_pair(config)
    tokens = make_tokens(config)
    labels = tokens.clone()
    labels[:, :7] = -100
    for options in ({}, {"num_items_in_batch": 11}, {"num_items_in_batch": torch.tensor(11)}):
        ours = model(tokens, labels=labels, **options).loss
        assert ours.item() == pytest.approx(llama(tokens, labels=labels, **options).loss.item(), abs=1e-5)
    nothing = torch.full_like(labels, -100)
    assert model(tokens, labels=nothing).loss.isnan() and llama(tokens, labels=nothing).loss.isnan()
    assert model(tokens, labels=nothing, num_items_in_batch=1).loss.item() == 0.0


def test_loss_of_16_bit_logits_is_computed_in_float32() -> None:
    logits = (torch.randn(2, 9, 131, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    labels = make_tokens(make_config(), batch=2, seq_len=9)
    loss = causal_lm_loss(logits, labels, 131)
    expected = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="labels or shift_labels"):
        causal_lm_loss(logits, None, 131)


# ----------------------------------------------------------------------------------------------------------
# Generation and cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_generation_with_and_without_cache_equals_llamas(attention: str) -> None:
    config = make_config()
    model, llama = make_pair(config, attention)
    prompt = make_tokens(config, seq_len=7)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (3, 27)
    assert len(set(cached[:, 7:].flatten().tolist())) > 5
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert torch.equal(cached, llama.generate(prompt, **options))
    assert torch.equal(cached, model.generate(prompt, cache_implementation="static", **options))


def test_cache_in_pieces_gives_the_logits_of_one_pass() -> None:
    config = make_config()
    model = make_pair(config)[0].eval()
    tokens = make_tokens(config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False)
        assert whole.past_key_values is None
        cache, pieces = None, []
        for piece in tokens.split([6, 1, 5, 7], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert relative_error(torch.cat(pieces, 1), whole.logits) < 1e-5
    assert model.train()(tokens).past_key_values is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_sequences_packed_by_position_ids_do_not_see_each_other(training: bool, attention: str) -> None:
    config = make_config()
    model = make_pair(config, attention)[0].train(training)
    tokens = make_tokens(config, seq_len=16)
    position_ids = torch.cat([torch.arange(7), torch.arange(9)])[None].expand(3, -1)
    packed = model(tokens, position_ids=position_ids).logits
    assert relative_error(packed[:, 7:], model(tokens[:, 7:]).logits) < 1e-5
    assert relative_error(packed[:, 7:], model(tokens).logits[:, 7:]) > 1e-2


def test_logits_to_keep_and_hidden_states() -> None:
    config = make_config()
    model, llama = make_pair(config)
    tokens = make_tokens(config)
    whole = model(tokens, output_hidden_states=True)
    reference = llama(tokens, output_hidden_states=True).hidden_states
    assert len(whole.hidden_states) == len(reference) == 3
    for ours, theirs in zip(whole.hidden_states, reference, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert relative_error(model(tokens, logits_to_keep=2).logits, whole.logits[:, -2:]) < 1e-6
    chosen = torch.tensor([3, 8])
    assert relative_error(model(tokens, logits_to_keep=chosen).logits, whole.logits[:, chosen]) < 1e-6
    by_embedding = model(inputs_embeds=model.embed_tokens(tokens))
    assert relative_error(by_embedding.logits, whole.logits) < 1e-6
    assert isinstance(model(tokens, return_dict=False), tuple)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)


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


# ----------------------------------------------------------------------------------------------------------
# Precision


def test_bf16_autocast_keeps_the_stream_in_bf16_and_stays_near_float32() -> None:
    config = make_config()
    model, llama = make_pair(config)
    tokens = make_tokens(config)
    model(tokens, labels=tokens).loss.backward()
    exact = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(tokens, labels=tokens, output_hidden_states=True)
        theirs = llama(tokens, labels=tokens)
    assert {state.dtype for state in ours.hidden_states} == {torch.bfloat16}
    assert ours.logits.dtype == torch.bfloat16 and ours.loss.dtype == torch.float32
    ours.loss.backward()
    theirs.loss.backward()
    reference = llama_gradients(model, llama)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        error = relative_error(gradient, exact[name])
        assert 1e-4 < error < 4e-2, f"{name}: {error:.2e}"
        assert error < 3 * relative_error(reference[name], exact[name]), name


def test_bfloat16_model_agrees_with_llama() -> None:
    config = make_config()
    model, llama = make_pair(config)
    exact = model(make_tokens(config)).logits
    tokens = make_tokens(config)
    ours = model.bfloat16()(tokens).logits
    theirs = llama.bfloat16()(tokens).logits
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact) < 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 1e-3)])
def test_norm_equals_llamas(dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = ArgonneRMSNorm(60, 1e-6), LlamaRMSNorm(60, 1e-6)
    torch.manual_seed(0)
    weight = torch.randn(60)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
        norm.to(dtype)
    x = torch.randn(5, 7, 60).to(dtype)
    assert ours(x).dtype == dtype
    assert relative_error(ours(x), theirs(x)) <= tolerance


def test_rotation_of_16_bit_heads_rounds_once() -> None:
    config = make_config()
    heads = torch.randn(2, 64, 6, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.arange(4000, 4064)[None]
    tables = rotary_tables(rotary_frequencies(config), positions, torch.bfloat16)
    exact = apply_rotary(heads.double(), *rotary_tables(rotary_frequencies(config), positions, torch.float64))
    rotated = apply_rotary(heads, *tables)
    assert rotated.dtype == torch.bfloat16 and tables[0].dtype == torch.float32
    assert relative_error(rotated, exact.bfloat16()) < 2e-4


# ----------------------------------------------------------------------------------------------------------
# The autograd functions


def test_gradcheck_of_norm_and_swiglu() -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x, w: _RMSNormFunction.apply(x, w, 1e-6), (draw(2, 3, 6), draw(6)))
    assert torch.autograd.gradcheck(_SwiGLUFunction.apply, (draw(2, 3, 5), draw(2, 3, 5)))


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of what ``function`` computes, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_swiglu_save_only_their_inputs(dtype: torch.dtype) -> None:
    tokens, hidden = 2 * 16, 64
    x, up = (torch.randn(2, 16, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
    norm = ArgonneRMSNorm(hidden, 1e-6)
    one = tokens * hidden * dtype.itemsize
    assert saved_bytes(lambda: norm(x)) == one + hidden * 4 + tokens * 4
    assert saved_bytes(lambda: _SwiGLUFunction.apply(x, up)) == 2 * one


def test_activation_checkpointing_gives_the_same_gradients_bit_for_bit() -> None:
    config = make_config()
    model = make_pair(config)[0]
    tokens = make_tokens(config)
    model(tokens, labels=tokens).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *args, plain=plain, **kwargs: torch.utils.checkpoint.checkpoint(
            plain, *args, use_reentrant=False, **kwargs
        )
    model(tokens, labels=tokens).loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_block_equals_eager(autocast: bool, backend: str) -> None:
    config = make_config()
    model = make_pair(config)[0]
    plain = model.blocks[0]
    tables = model._position_embeddings(make_tokens(config, 2, 16), torch.float32, None, None)
    results = []
    for block in (plain, torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)):
        x = torch.randn(2, 16, 60, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = block(x.bfloat16() if autocast else x, position_embeddings=tables)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        out.float().square().sum().backward()
        results.append([out.detach(), x.grad, *gradients(plain).values()])
    for eager, compiled in zip(*results, strict=True):
        # Inductor keeps intermediates of a fused kernel in float32 where eager rounds each to bfloat16.
        assert relative_error(compiled, eager) < (2e-2 if autocast and backend == "inductor" else 1e-5)
