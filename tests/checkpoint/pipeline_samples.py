"""Checkpoints as the pipeline scripts save them: whole, and cut into stages."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne.checkpoint.reader import CheckpointReader
from argonne.testing.checkpoint_samples import sample_shapes, unsharded
from tests import FIXTURES


def fixture_config(step: int) -> dict[str, Any]:
    """The shape of the fixture checkpoint of ``step``, told by the file beside it."""
    told = json.loads((FIXTURES / f"streaming_checkpoint_step_{step}.json").read_text())
    config: dict[str, Any] = told["config"]
    return config


def pipeline_checkpoint(tied: bool = False) -> dict[str, Any]:
    """What a pipeline script saves, for the sample model."""
    names = list(sample_shapes(tied))
    weights = {name: unsharded(name, "param") for name in names}
    if tied:
        weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
    return {
        "global_step": 12,
        "tokens_processed": 999,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": adam_state(names), "param_groups": [group(range(len(names)))]},
        "scheduler_state_dict": {"step": 11},
        "loss": 3.25,
        "data_position": {"streaming": True, "current_file_idx": 1, "position_in_file": 5, "chunk_offset": 2},
        "model_dtype": "torch.float32",
    }


def adam_state(names: Any) -> dict[int, dict[str, Tensor]]:
    """AdamW's state of the named weights, by their index."""
    return {
        index: {
            "step": torch.tensor(12.0),
            "exp_avg": unsharded(name, "exp_avg"),
            "exp_avg_sq": unsharded(name, "exp_avg_sq"),
        }
        for index, name in enumerate(names)
    }


def group(indices: Any) -> dict[str, Any]:
    """An AdamW parameter group."""
    return {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "params": list(indices)}


def assert_whole(reader: CheckpointReader, tied: bool = False, adam: bool = True) -> None:
    """The reader shows the sample model's every weight and Adam state."""
    assert reader.tied == tied and set(reader.names) == set(sample_shapes(tied))
    assert reader.step == 12 and bool(reader.adam) == adam
    for name, shape in sample_shapes(tied).items():
        origin = (0,) * len(shape)
        assert torch.equal(reader.read(name, origin, shape), unsharded(name, "param")), name
        for key in ("exp_avg", "exp_avg_sq") if adam else ():
            assert torch.equal(reader.read_optimizer(name, key, origin, shape), unsharded(name, key)), name


def write_stages(
    folder: Path, *, local_numbers: bool = False, named: bool = True, by_keys: bool = False
) -> list[Path]:
    """The sample cut into two stages: embedding and layer 0; layer 1, norm and head."""
    whole = pipeline_checkpoint()
    names = list(sample_shapes(tied=False))
    last = [name for name in names if name.startswith(("blocks.1", "norm", "lm_head"))]
    paths = []
    for stage, own in enumerate(([name for name in names if name not in last], last)):
        number = {name: name.replace("blocks.1.", "blocks.0.") if local_numbers else name for name in own}
        part = {**whole, "model_state_dict": {number[name]: unsharded(name, "param") for name in own}}
        part["optimizer_state_dict"] = {"state": adam_state(own), "param_groups": [group(range(len(own)))]}
        if by_keys or local_numbers:
            part |= {"pipeline_stage": stage, "num_stages": 2, "layer_range": [stage, stage + 1]}
        name = f"streaming_checkpoint_step_12_stage_{stage}_of_2.pth" if named else f"part{stage}.pth"
        torch.save(part, folder / name, _use_new_zipfile_serialization=bool(stage))
        paths.append(folder / name)
    return paths
