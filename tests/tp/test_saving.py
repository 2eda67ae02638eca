"""A split model at transformers' doors: save_pretrained, a second split, the loss's arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from argonne.errors import ConfigError
from argonne.testing.distributed import run_ranks
from argonne.testing.models import random_tokens, small_model
from model import ArgonneModel
from tests.tp.hf_models import VOCAB, build
from tp_shard import SimulatedTPGroup, TensorParallelModel, shard_tensor_parallel, unsharded_state_dict


def saving_rank(rank: int, world_size: int, folder: str) -> str:
    """Refused without the whole weights; with them rank 0 writes an export that opens."""
    model = small_model(torch.float32)
    shard_tensor_parallel(model)
    refused: list[dict[str, Any]] = [{}, {"state_dict": model.state_dict()}]
    for options in refused:
        with pytest.raises(ConfigError, match="slices of one of 2 tensor-parallel ranks"):
            model.save_pretrained(folder, **options)
    whole = unsharded_state_dict(model)
    if rank == 0:
        model.save_pretrained(folder, state_dict=whole)
    return "" if rank else "saved"


@pytest.mark.libraries
def test_save_pretrained_of_a_split_model(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    assert run_ranks(saving_rank, 2, str(folder)) == ["saved", ""]
    expected = small_model(torch.float32).state_dict()
    loaded = ArgonneModel.from_pretrained(folder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_a_split_over_one_rank_saves_as_ever(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    shard_tensor_parallel(model, SimulatedTPGroup.create(1)[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(ArgonneModel.from_pretrained(tmp_path).norm.weight, model.norm.weight)


@pytest.mark.parametrize("size", [1, 2])
def test_a_second_split_is_one_clear_error(size: int) -> None:
    group = SimulatedTPGroup.create(size)[0]
    model = shard_tensor_parallel(build("llama"), group)
    wrapped = TensorParallelModel(small_model(torch.float32), group)
    for divided in (model, wrapped, wrapped.model):
        with pytest.raises(ConfigError, match="is already divided over ranks: split a model that is whole"):
            shard_tensor_parallel(divided, group)


def split_tensors(rank: int, world_size: int) -> str:
    model: Any = build("llama")
    mesh = init_device_mesh("cpu", (world_size,))
    norm = model.model.norm
    norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ConfigError, match="already divided"):
        shard_tensor_parallel(model)
    return "refused"


def test_a_model_that_another_library_divided() -> None:
    assert run_ranks(split_tensors, 2) == ["refused", "refused"]


def test_the_loss_refuses_what_the_models_own_loss_refuses() -> None:
    """Transformers' own losses take any keyword, and their models pass some on."""
    group = SimulatedTPGroup.create(1)[0]
    logits = torch.randn(2, 5, VOCAB)
    labels = random_tokens(VOCAB, length=5)
    argonne: Any = shard_tensor_parallel(small_model(torch.float32), group)
    with pytest.raises(TypeError, match="the loss does not know the argument label_smoothing"):
        argonne.loss_function(logits=logits, labels=labels, label_smoothing=0.1)
    llama: Any = shard_tensor_parallel(build("llama"), group)
    loss: Tensor = llama.loss_function(logits=logits, labels=labels, vocab_size=VOCAB, output_scores=None)
    assert loss.isfinite()
