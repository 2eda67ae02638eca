"""A checkpoint as an unsharded model: the same values as torch.load; what is none is refused."""

from pathlib import Path

import pytest
import torch

from argonne.checkpoint.reader import open_checkpoint
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import save_sample
from tests import FIXTURES

STEPS = (25, 40)


@pytest.mark.parametrize("step", STEPS)
def test_fixtures_hold_what_torch_loads(step: int) -> None:
    path = FIXTURES / f"streaming_checkpoint_step_{step}.pth"
    reader = open_checkpoint(path)
    loaded = torch.load(path, weights_only=True)
    assert reader.files[0].serialization == "legacy" and reader.kind == "pipeline"
    assert reader.tied == (step == 25)
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in loaded["model_state_dict"].items()}
    assert list(reader.model) == list(weights)
    for index, name in enumerate(reader.names):
        shape = tuple(weights[name].shape)
        origin = (0,) * len(shape)
        assert torch.equal(reader.read(name, origin, shape), weights[name].float())
        state = loaded["optimizer_state_dict"]["state"][index]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.read_optimizer(name, key, origin, shape), state[key].float())
        assert reader.adam_step(name) == state["step"].item() == step
    assert reader.metadata["data_position"] == loaded["data_position"]
    assert reader.metadata["tokens_processed"] == loaded["tokens_processed"]
    assert reader.param_groups[0]["lr"] == loaded["optimizer_state_dict"]["param_groups"][0]["lr"]


def test_empty_file_is_named_with_its_size(tmp_path: Path) -> None:
    path = tmp_path / "streaming_checkpoint_step_3.pth"
    path.touch()
    with pytest.raises(CheckpointError, match=r"_step_3\.pth: the file is empty \(0 bytes\)"):
        verify_checkpoint(path)


def test_a_file_saved_again_by_torch_is_not_taken_for_ours(tmp_path: Path) -> None:
    saved, _ = save_sample(tmp_path)
    path = tmp_path / "again.pth"
    torch.save(torch.load(saved, weights_only=True), path)
    with pytest.raises(CheckpointError, match="digest at its end is missing"):
        verify_checkpoint(path)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argonne.checkpoint.save.FORMAT_VERSION", 2)
    path, _ = save_sample(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint format 2, this program reads up to 1: upgrade"):
        verify_checkpoint(path)
