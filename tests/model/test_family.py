"""The family's switches against an independent reading of their definition, and a fixture's losses."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from argonne.testing.models import SMALL, loss_of, random_tokens, relative_error, small_model
from model import ArgonneConfig, ArgonneModel
from tests import FIXTURES
from tests.model.family_reference import SWITCHES, logits_of, loss_and_gradients

ONE_AT_A_TIME = [
    {"qk_norm": True},
    {"v_norm": True},
    {"sandwich_norm": True},
    {"logit_softcap": 2.0},
    {"interleaved_local_attention": True, "local_attention_window": 3},
    {"z_loss_weight": 0.1},
]


def compare(model: ArgonneModel, tolerance: float, length: int = 14) -> None:
    tokens = random_tokens(length=length)
    loss = loss_of(model, tokens)
    loss.backward()
    expected, gradients = loss_and_gradients(model, tokens)
    assert abs(loss.item() - expected) <= tolerance * abs(expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, gradients[name]) <= tolerance, name
    with torch.no_grad():
        logits = model(input_ids=tokens, shift_labels=tokens).logits
        assert (
            relative_error(logits, logits_of(dict(model.named_parameters()), model.config, tokens))
            <= tolerance
        )


@pytest.mark.parametrize("changes", [*ONE_AT_A_TIME, SWITCHES], ids=lambda changes: next(iter(changes)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_every_gradient(changes: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    compare(small_model(dtype, num_hidden_layers=4, **changes), tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 200])
def test_windows_shorter_and_longer_than_a_run_of_queries(window: int, attention: str) -> None:
    model = small_model(num_hidden_layers=2, interleaved_local_attention=True, local_attention_window=window)
    model.set_attn_implementation(attention)
    compare(model, 1e-10, length=300)


@pytest.mark.slow
def test_random_configurations() -> None:
    generator = torch.Generator().manual_seed(20)
    print("seed 20")
    for _ in range(40):
        flip = (torch.rand(9, generator=generator) < 0.5).tolist()
        window = int(torch.randint(1, 20, (1,), generator=generator))
        changes: dict[str, Any] = {
            "qk_norm": flip[0],
            "v_norm": flip[1],
            "sandwich_norm": flip[2],
            "logit_softcap": 3.0 if flip[3] else 0.0,
            "interleaved_local_attention": flip[4],
            "local_attention_window": window,
            "z_loss_weight": 0.05 if flip[5] else 0.0,
            "tie_word_embeddings": flip[6],
            "attention_bias": flip[7],
            "num_key_value_heads": 2 if flip[8] else 8,
        }
        compare(small_model(num_hidden_layers=3, **changes), 1e-10, length=25)


def test_an_ignored_target_takes_no_part_in_the_z_loss() -> None:
    model = small_model(**SWITCHES)
    tokens = random_tokens()
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = -100
    loss = model(input_ids=tokens[:, :-1], shift_labels=targets).loss
    kept = targets != -100
    logits = logits_of(dict(model.named_parameters()), model.config, tokens[:, :-1])[kept]
    expected = (
        torch.nn.functional.cross_entropy(logits, targets[kept]) + 0.1 * logits.logsumexp(-1).pow(2).mean()
    )
    assert relative_error(loss, expected) < 1e-12


def test_the_parameters_are_in_the_contracts_order() -> None:
    names = [name for name, _ in small_model(**SWITCHES).named_parameters()]
    block = [name.removeprefix("blocks.0.").removesuffix(".weight") for name in names if "blocks.0." in name]
    assert block == [
        "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "attn.q_norm", "attn.k_norm",
        "attn.v_norm_layer", "input_norm", "post_norm", "attn_out_norm", "mlp_out_norm", "mlp.gate_proj",
        "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static", "without"])
def test_generation_equals_taking_the_likeliest_token_of_the_whole_sequence(
    cache: str | None, attention: str
) -> None:
    model = small_model(torch.float32, num_hidden_layers=4, **SWITCHES).eval()
    model.set_attn_implementation(attention)
    prompt = random_tokens(length=6)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"use_cache": False} if cache == "without" else {"cache_implementation": cache}
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    expected = prompt
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for _ in range(12):
            best = logits_of(weights, model.config, expected)[:, -1].argmax(-1)
            expected = torch.cat((expected, best[:, None]), 1)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(attention: str) -> None:
    model = small_model(torch.float32, num_hidden_layers=4, **SWITCHES).eval()
    model.set_attn_implementation(attention)
    tokens = random_tokens(length=9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    padded = model.generate(tokens, attention_mask=mask, **options)
    alone = model.generate(tokens[:1, 4:], attention_mask=mask[:1, 4:], **options)
    assert torch.equal(padded[:1, 4:], alone)
    assert torch.equal(padded[1:], model.generate(tokens[1:], attention_mask=mask[1:], **options))


def test_unknown_arguments_and_settings_are_refused_by_name() -> None:
    model = small_model()
    with pytest.raises(TypeError, match="does not know the argument attention_maks"):
        model(input_ids=random_tokens(), attention_maks=None)
    refused: dict[str, Any] = {
        "sliding_window": 64,
        "mtp_horizon": 2,
        "attn_temperature": 1.5,
        "hidden_act": "gelu",
    }
    for key, value in refused.items():
        with pytest.raises(ValueError, match=key):
            ArgonneConfig(**SMALL, **{key: value})
    ArgonneConfig(**SMALL, sliding_window=None, mtp_horizon=1, use_cache=False, initializer_range=0.02)
    ArgonneConfig(**SMALL, sliding_window=4096, use_sliding_window=False, layer_types=["full_attention"])
    with pytest.raises(ValueError, match="layer_types"):
        ArgonneConfig(**SMALL, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="local_attention_window"):
        ArgonneConfig(**SMALL, interleaved_local_attention=True)


def test_both_names_of_the_cache() -> None:
    model = small_model(**SWITCHES).eval()
    tokens = random_tokens(length=10)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :6], use_cache=True)
        second = model(tokens[:, 6:], cache=first.past_key_values)
    assert relative_error(second.logits, whole[:, 6:]) < 1e-10
    with pytest.raises(ValueError, match="both cache and past_key_values"):
        model(tokens, cache=first.past_key_values, past_key_values=second.past_key_values.__class__())


def test_the_family_fixture_gives_its_losses_and_norms() -> None:
    told = json.loads((FIXTURES / "family_checkpoint_step_20.json").read_text())
    saved = torch.load(FIXTURES / "family_checkpoint_step_20.pt", weights_only=True)
    model = ArgonneModel(ArgonneConfig(**told["config"])).train()
    model.load_state_dict(saved["model_state_dict"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    rows = zip(told["token_batches"], told["learning_rates"], told["losses"], told["grad_norms"], strict=True)
    for batch, rate, loss, norm in rows:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        actual = loss_of(model, torch.tensor(batch))
        actual.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), told["hyperparameters"]["clip"])
        optimizer.step()
        assert abs(actual.item() - loss) <= 3e-5
        assert abs(grad_norm.item() / norm - 1) <= 3e-4


def test_the_released_folders_probe() -> None:
    told = json.loads((FIXTURES / "family_checkpoint_step_20.json").read_text())
    model = ArgonneModel(ArgonneConfig(**told["config"])).eval()
    weights = load_file(FIXTURES / "family_checkpoint_step_20_hf" / "model.safetensors")
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    tokens = torch.tensor(told["folder_probe"])
    with torch.no_grad():
        output = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
    assert abs(output.loss.item() - told["folder_probe_loss"]) <= 3e-5
    expected = torch.tensor(told["folder_last_logits_16"])
    assert torch.allclose(output.logits[0, -1, :16], expected, atol=1e-4)


def enable_checkpointing(model: Any, **options: Any) -> None:
    """By the name that the version at hand does not call old."""
    old = not hasattr(model, "activation_checkpointing_enable")
    name = "gradient_checkpointing_enable" if old else "activation_checkpointing_enable"
    getattr(model, name)(**options)


@pytest.mark.libraries
def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens = random_tokens()
    plain, checkpointed = small_model(**SWITCHES), small_model(**SWITCHES)
    enable_checkpointing(checkpointed)
    calls: list[int] = []
    for index, block in enumerate(checkpointed.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    for model in (plain, checkpointed):
        loss_of(model, tokens).backward()
    assert calls == [0, 1, 1, 0], "each block runs again in the backward pass"
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad), name


def test_gradient_checkpointing_of_every_other_layer_and_caches() -> None:
    tokens = random_tokens()
    model = small_model(**SWITCHES)
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False), every_n_layers=2)
    assert [model._checkpoints(layer) for layer in range(4)] == [True, False, True, False]
    assert model(tokens, use_cache=True).past_key_values is None, "a recomputation would write into it"
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot read a cache under gradient checkpointing"):
        model(tokens, past_key_values=cache)
    model._set_gradient_checkpointing(enable=False)
    assert not model._checkpoints()
