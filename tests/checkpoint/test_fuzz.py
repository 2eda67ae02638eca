"""Checkpoints with odd things in odd places: one line that says what is wrong, or a load; nothing else."""

import copy
import os
import random
from pathlib import Path
from typing import Any

import convert_checkpoint
import inspect_checkpoint
import pytest
import torch

from argonne.checkpoint.view import view_of
from argonne.config.presets import PRESETS
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import MODEL_CONFIG, empty_slices, sample_map, save_sample
from checkpointing import choose_checkpoint, infer_model_config, load_slices

ODD: list[Any] = [
    *(None, "abc", "", -5, 10**30, 1.5, float("nan"), float("inf"), True, [], {}, (), [1, 2], {"a": 1}),
    *(torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4)),
    *(torch.zeros(5, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.bool), torch.full((24,), torch.nan)),
]


def _places(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [here, *(place for key, child in children for place in _places(child, (*here, key)))]


def _spoil(tree: Any, place: tuple[Any, ...], rng: random.Random) -> None:
    """Put something odd there, or take away what is there."""
    for key in place[:-1]:
        if not isinstance(tree, dict | list) or (isinstance(tree, dict) and key not in tree):
            return
        if isinstance(tree, list) and not (isinstance(key, int) and key < len(tree)):
            return
        tree = tree[key]
    if isinstance(tree, dict) and place[-1] in tree and rng.random() < 0.25:
        del tree[place[-1]]
    elif isinstance(tree, dict) or (isinstance(tree, list) and place[-1] in range(len(tree))):
        tree[place[-1]] = rng.choice(ODD)


def _load(path: Path) -> None:
    """What a run does with it."""
    choice = choose_checkpoint(str(path), path.parent)
    assert choice.reader is not None
    view = view_of(choice.reader)
    infer_model_config(view, {**PRESETS["argonne-2.0"], **MODEL_CONFIG})  # type: ignore[arg-type]
    slice_map = sample_map(1)
    parameters, adam = empty_slices(slice_map, 0)
    load_slices(view, slice_map=slice_map, rank=0, parameters=parameters, adam=adam, control_group=None)
    for name, tensor in parameters.items():
        assert bool(tensor.isfinite().all()), name
    assert view.step >= 0 and int(view.metadata.get("tokens_processed") or 0) >= 0
    float(view.metadata.get("loss") or 0.0)


@pytest.mark.parametrize("rounds", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_odd_trees_are_refused_in_one_line_or_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rounds: int
) -> None:
    seed = 3 if rounds < 100 else int.from_bytes(os.urandom(4), "little")
    rng = random.Random(seed)
    whole = torch.load(save_sample(tmp_path / "whole")[0], weights_only=True)
    del whole["checkpoint_format"]
    places = _places(whole)[1:]
    shallow = [place for place in places if len(place) <= 2]
    path = tmp_path / "streaming_checkpoint_step_7.pth"
    refused = 0
    for _ in range(rounds):
        tree = copy.deepcopy(whole)
        for _ in range(rng.choice((1, 1, 2))):
            _spoil(tree, rng.choice(rng.choice((shallow, places))), rng)
        torch.save(tree, path)
        try:
            _load(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
        inspect_checkpoint.main([str(path)])
        form = rng.choice(("pipeline", "tensor-parallel"))
        output = str(tmp_path / "converted.pth")
        convert_checkpoint.main(
            ["--checkpoint-path", str(path), "--output", output, "--to", form, "--overwrite"]
        )
        said = capsys.readouterr().err.splitlines()
        assert len(said) <= 2 and all(line.startswith("error: ") for line in said), (seed, said)
    assert rounds / 4 < refused < rounds, (seed, refused)
    print("seed", seed)
