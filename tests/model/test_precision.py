"""The model in 16 bits, its autograd functions, recomputed and compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from argonne.testing.hf_reference import llama_gradients
from argonne.testing.models import relative_error
from model import (
    ArgonneRMSNorm,
    _RMSNormFunction,
    _SwiGLUFunction,
    apply_rotary,
    rotary_frequencies,
    rotary_tables,
)
from tests.model.model_pairs import gradients, make_config, make_pair, make_tokens

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
    tables = model._rotary_tables.of_call(
        model.rotary_frequencies, make_tokens(config, 2, 16), torch.float32, None, None
    )
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
