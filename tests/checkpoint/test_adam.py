"""Adam state is matched to parameters by order and shape, or refused."""

from pathlib import Path

import pytest
import torch

from argonne.checkpoint.parts import open_any
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import sample_shapes, unsharded
from tests.checkpoint.pipeline_samples import (
    adam_state,
    assert_whole,
    group,
    pipeline_checkpoint,
)


def test_two_parameter_groups_are_matched_by_shape(tmp_path: Path) -> None:
    checkpoint = pipeline_checkpoint()
    names = list(sample_shapes(tied=False))
    matrices = [name for name in names if unsharded(name, "param").ndim == 2]
    vectors = [name for name in names if name not in matrices]
    count = len(matrices)
    checkpoint["optimizer_state_dict"] = {
        "state": adam_state(matrices + vectors),
        "param_groups": [group(range(count)), group(range(count, len(names)))],
    }
    path = tmp_path / "streaming_checkpoint_step_12.pth"
    torch.save(checkpoint, path)
    assert_whole(open_any(path))


@pytest.mark.parametrize(("change", "message"), [("drop", "counts 20 parameters"), ("swap", "exp_avg of ")])
def test_optimizer_state_that_does_not_fit_is_an_error(tmp_path: Path, change: str, message: str) -> None:
    checkpoint = pipeline_checkpoint()
    state = checkpoint["optimizer_state_dict"]
    if change == "drop":
        state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:20]
    else:
        state["state"][0], state["state"][1] = state["state"][1], state["state"][0]
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        open_any(tmp_path / "a.pth")
