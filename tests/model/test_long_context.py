"""Long sequences: nothing is quadratic in the length, and the rotary tables are built once."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from argonne.ranks.recompute import recompute_blocks
from argonne.testing.models import loss_of, random_tokens, small_model
from argonne.tp.group import SimulatedTPGroup
from argonne.verification.simulate import simulate
from tp_shard import shard_tensor_parallel

LENGTH = 2048
NARROW: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": LENGTH,
    "qk_norm": True,
    "v_norm": True,
    "sandwich_norm": True,
    "logit_softcap": 15.0,
}
WIDEST = 64
"""Elements a token of the largest tensor at tp 1: gate and up together."""


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, in the forward and backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            elements = result.untyped_storage().nbytes() // 4 if isinstance(result, torch.Tensor) else 0
            if elements > self.elements:
                self.elements, self.operation = elements, str(func)
        return results


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("recomputed", ["none", "full"])
@pytest.mark.parametrize("window", [None, 100])
def test_no_step_allocates_anything_quadratic(size: int, recomputed: str, window: int | None) -> None:
    changes = {**NARROW, "interleaved_local_attention": window is not None, "local_attention_window": window}
    plain = small_model(torch.float32, **changes)
    models = [copy.deepcopy(plain) for _ in range(size)]
    tokens = random_tokens(NARROW["vocab_size"], batch=1, length=LENGTH + 1)

    def work(group: SimulatedTPGroup) -> LargestResult:
        split: Any = shard_tensor_parallel(models[group.rank], group, sequence_parallel=size > 1)
        recompute_blocks(split.blocks, recomputed)
        with LargestResult() as largest:
            loss_of(split, tokens).backward()
        return largest

    for largest in simulate(SimulatedTPGroup.create(size), work):
        # A matrix of scores would be 128 times this; windows cost (window x length) masks at most.
        assert LENGTH < largest.elements <= WIDEST * LENGTH, largest.operation


def count_tables(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    built: list[int] = []
    plain = model_module.rotary_tables

    def counting(frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> Any:
        built.append(positions.shape[1])
        return plain(frequencies, positions, dtype)

    monkeypatch.setattr(model_module, "rotary_tables", counting)
    return built


def test_tables_are_built_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    built = count_tables(monkeypatch)
    model = small_model(torch.float32)
    recompute_blocks(model.blocks, "full")
    for _ in range(3):
        loss_of(model, random_tokens(length=14)).backward()
    loss_of(model, random_tokens(length=9)).backward()  # a prefix of what is there
    assert built == [13]
    loss_of(model, random_tokens(length=21)).backward()
    assert built == [13, 20]


def test_kept_tables_change_nothing() -> None:
    tokens = random_tokens(length=9)
    model = small_model(torch.float32)
    expected = loss_of(small_model(torch.float32), tokens)
    loss_of(model, random_tokens(length=30))
    assert torch.equal(loss_of(model, tokens), expected)
    model.double()
    assert loss_of(model, tokens).dtype == torch.float64
    kept = model._rotary_tables.kept
    assert kept is not None and kept[0].dtype == torch.float64


def test_training_goes_on_after_inference_mode() -> None:
    """Tensors made in inference mode can't be kept for a backward pass."""
    model = small_model(torch.float32)
    with torch.inference_mode():
        model(input_ids=random_tokens(length=9), use_cache=False)
    loss_of(model, random_tokens(length=9)).backward()
