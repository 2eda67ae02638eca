"""The forms of norm and rotation that eager CUDA code takes, on the CPU beside the plain ones."""

from typing import Any

import pytest
import torch

import model as decoder
from argonne.testing.models import random_tokens, relative_error, small_model


@pytest.fixture
def cuda_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused backward has no CPU kernel: the gradient of its forward stands in."""

    def backward(grad: Any, x: Any, rstd: Any, weight: Any, needs: list[bool]) -> Any:
        with torch.enable_grad():
            x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
            normed = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
        return torch.autograd.grad(normed, (x, weight), grad)

    monkeypatch.setattr(decoder, "saves_traffic", lambda x: True)
    monkeypatch.setattr(decoder, "fused_norm_backward", backward)


def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = small_model(dtype, qk_norm=True, sandwich_norm=True)
    tokens = random_tokens()
    loss = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.float64, 1e-6)])
def test_a_model_has_the_same_loss_and_gradients(
    dtype: torch.dtype, most: float, request: pytest.FixtureRequest
) -> None:
    plain = gradients(dtype)
    request.getfixturevalue("cuda_forms")
    for name, gradient in gradients(dtype).items():
        assert relative_error(gradient, plain[name]) < most, name


def test_rotation_in_bfloat16_rounds_once() -> None:
    """Against float64: half a unit in the last place, forward and backward; views keep their strides."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 9, 3, 10, generator=generator, dtype=torch.bfloat16)
    angles = torch.randn(1, 9, 1, 5, generator=generator).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        leaf = given.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        rotated = decoder._RotaryFunction.apply(leaf, cos, sin)
        exact = given.double().requires_grad_()
        expected = decoder.apply_rotary(exact, cos.double(), sin.double())
        weight = torch.randn(rotated.shape, generator=generator, dtype=torch.bfloat16)
        rotated.backward(weight)
        expected.backward(weight.double())
        assert leaf.grad is not None and exact.grad is not None
        assert rotated.stride() == given.stride() and rotated.dtype == torch.bfloat16
        torch.testing.assert_close(rotated.double(), expected, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_the_cpu_and_compiled_code_keep_the_plain_forms() -> None:
    assert not decoder.saves_traffic(torch.zeros(2))
