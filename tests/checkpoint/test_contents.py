"""What a checkpoint file holds: torch, the model and AdamW load it."""

from pathlib import Path

import pytest
import torch

from argonne.testing.checkpoint_samples import (
    MODEL_CONFIG,
    sample_map,
    sample_shapes,
    save_sample,
    unsharded,
)
from checkpointing import (
    estimate_checkpoint_bytes,
)
from model import ArgonneConfig, ArgonneModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sample(tmp_path_factory.mktemp("saved"))[0]


@pytest.mark.parametrize("mapped", [False, True])
def test_plain_torch_loads_it(saved: Path, mapped: bool) -> None:
    loaded = torch.load(saved, weights_only=True, mmap=mapped)
    for name in sample_shapes():
        assert torch.equal(loaded["model_state_dict"][name], unsharded(name, "param"))
    for index, name in enumerate(sample_shapes()):
        state = loaded["optimizer_state_dict"]["state"][index]
        assert torch.equal(state["exp_avg"], unsharded(name, "exp_avg"))
        assert torch.equal(state["exp_avg_sq"], unsharded(name, "exp_avg_sq"))
        assert state["step"].item() == 7 and state["step"].shape == ()
    assert loaded["scheduler_state_dict"] == {"step": 6}
    assert loaded["data_position"]["token_offset"] == 17


@pytest.mark.parametrize("tied", [True, False])
def test_model_and_adamw_load_strictly_and_step(tmp_path: Path, tied: bool) -> None:
    path, _ = save_sample(tmp_path, tied=tied)
    loaded = torch.load(path, weights_only=True)
    model = ArgonneModel(ArgonneConfig(**MODEL_CONFIG, tie_word_embeddings=tied))
    model.load_state_dict(loaded["model_state_dict"], strict=True)
    optimizer = torch.optim.AdamW(model.parameters())
    own = optimizer.state_dict()["param_groups"][0]
    group = loaded["optimizer_state_dict"]["param_groups"][0]
    assert set(group) == set(own) and group["params"] == own["params"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.95), 0.1)
    optimizer.load_state_dict(loaded["optimizer_state_dict"])
    for (name, parameter), index in zip(model.named_parameters(), group["params"], strict=True):
        assert torch.equal(parameter, unsharded(name, "param"))
        state = optimizer.state_dict()["state"][index]
        assert torch.equal(state["exp_avg"], unsharded(name, "exp_avg"))
    tokens = torch.arange(12).reshape(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_tied_head_shares_its_record(saved: Path, tmp_path: Path) -> None:
    loaded = torch.load(saved, weights_only=True, mmap=True)["model_state_dict"]
    head, embedding = loaded["lm_head.weight"], loaded["embed_tokens.weight"]
    assert head is not embedding and head.data_ptr() == embedding.data_ptr()
    untied, _ = save_sample(tmp_path, tied=False)
    saving = untied.stat().st_size - saved.stat().st_size
    assert saving >= 3 * head.numel() * 4  # the weight and both moments of the head


def test_estimate_bounds_the_file(tmp_path: Path) -> None:
    path, report = save_sample(tmp_path)
    assert report is not None and report.size == path.stat().st_size
    assert report.size <= estimate_checkpoint_bytes(sample_map(1)) <= report.size + (2 << 20)
