"""Checkpoints in parts, pipeline stages or one file a rank: joined, or refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argonne.checkpoint.parts import cut_dimension, open_any
from argonne.checkpoint.shape import infer_model_config
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import MODEL_CONFIG, unsharded
from checkpointing import choose_checkpoint
from tests.checkpoint.pipeline_samples import assert_whole, pipeline_checkpoint, write_stages


@pytest.mark.parametrize("local_numbers", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_stages_are_joined(tmp_path: Path, local_numbers: bool, named: bool) -> None:
    paths = write_stages(tmp_path, local_numbers=local_numbers, named=named, by_keys=not named)
    assert_whole(open_any(tmp_path))
    if named:
        assert_whole(open_any(paths[1]))
        choice = choose_checkpoint(str(tmp_path), tmp_path)
        assert choice.reader is not None
        assert_whole(choice.reader)
    else:
        with pytest.raises(CheckpointError, match="it is stage 1 of 2 only"):
            open_any(paths[1])


def test_missing_double_and_contradictory_stages_are_named(tmp_path: Path) -> None:
    paths = write_stages(tmp_path)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(paths[1], moved)
    with pytest.raises(CheckpointError, match="stage 1 of 2 is missing"):
        open_any(paths[0])
    with pytest.raises(CheckpointError, match="stage 0 of 2 is missing"):
        open_any(moved)
    (tmp_path / paths[1].name).symlink_to(moved / paths[1].name)
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        open_any(paths[0])
    shutil.move(moved / paths[1].name, paths[1])
    shutil.copy(paths[1], tmp_path / "streaming_checkpoint_step_12_stage_1.pth")
    with pytest.raises(CheckpointError, match="stage 1 is there twice"):
        open_any(paths[0])
    (tmp_path / "streaming_checkpoint_step_12_stage_1.pth").unlink()
    shutil.copy(paths[0], paths[1])
    with pytest.raises(CheckpointError, match=r"layer 0 is in stage 0 .* and in stage 1"):
        open_any(paths[0])


def test_a_stage_whose_layers_are_not_its_range_is_refused(tmp_path: Path) -> None:
    paths = write_stages(tmp_path, by_keys=True)
    stage = torch.load(paths[1], weights_only=True)
    torch.save({**stage, "layer_range": [2, 3]}, paths[1])
    with pytest.raises(
        CheckpointError, match=r"layers 1 of 3 are not in it|says layers 2-2 and holds others"
    ):
        open_any(tmp_path)
    torch.save({**stage, "global_step": 13}, paths[1])
    with pytest.raises(CheckpointError, match="its parts are of different steps"):
        open_any(tmp_path)


def write_ranks(folder: Path, count: int = 2) -> list[Path]:
    """The sample cut as that script cuts: rows or columns, the last rank taking the rest."""
    paths = []
    for rank in range(count):
        part = pipeline_checkpoint()

        def cut(name: str, tensor: Tensor, rank: int = rank) -> Tensor:
            dimension = cut_dimension(name)
            if dimension is None:
                return tensor
            chunk = tensor.shape[dimension] // count
            stop = tensor.shape[dimension] if rank == count - 1 else (rank + 1) * chunk
            return tensor.narrow(dimension, rank * chunk, stop - rank * chunk).clone()

        weights = part["model_state_dict"]
        part["model_state_dict"] = {
            "base_model." + name: cut(name, tensor) for name, tensor in weights.items()
        }
        for index, name in enumerate(weights):
            state = part["optimizer_state_dict"]["state"][index]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = cut(name, state[key])
        path = folder / f"tensor_parallel_checkpoint_step_12_rank_{rank}_of_{count}.pth"
        torch.save(part, path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_slices_are_joined(tmp_path: Path, count: int) -> None:
    paths = write_ranks(tmp_path, count)
    assert_whole(open_any(tmp_path))
    assert_whole(open_any(paths[-1]))
    reader = open_any(paths[0])
    assert torch.equal(
        reader.read("blocks.1.mlp.down_proj.weight", (3, 10), (5, 30)),
        unsharded("blocks.1.mlp.down_proj.weight", "param")[3:8, 10:40],
    )
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=f"rank 0 of {count} is missing"):
        open_any(paths[1])


def test_ranks_that_drifted_apart_are_reported(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path)
    part = torch.load(paths[1], weights_only=True)
    part["model_state_dict"]["base_model.norm.weight"] += 1
    torch.save(part, paths[1])
    assert open_any(tmp_path).warnings == (
        "1 weights that all 2 ranks share differ between them; rank 0's are taken",
    )


def test_one_ranks_slices_alone_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "tensor_parallel_checkpoint_step_12.pth"
    shutil.move(write_ranks(tmp_path)[0], path)
    heads = {key: MODEL_CONFIG[key] for key in ("num_attention_heads", "num_key_value_heads")}
    with pytest.raises(CheckpointError, match=r"one of 2 tensor-parallel ranks .12 of 24 query rows"):
        infer_model_config(open_any(path), heads)
