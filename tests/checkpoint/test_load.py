"""Loading: errors that are the same on all ranks, and what a file does not hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.checkpoint import transfer
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import (
    empty_slices,
    sample_map,
    sample_shapes,
    save_sample,
    unsharded,
)
from argonne.testing.distributed import run_ranks
from checkpointing import (
    load_slices,
)
from tests.checkpoint.loading import assert_loaded, open_view, outcome


def _errors_are_shared(rank: int, world_size: int, folder: str) -> list[str]:
    wrong = sample_map(world_size)
    told = [
        outcome(lambda: open_view(f"{folder}/nowhere.pth", rank)),
        outcome(lambda: open_view(folder, rank)),
    ]
    view = open_view(f"{folder}/nan.pth", rank)
    parameters, adam = empty_slices(wrong, rank)
    told.append(
        outcome(
            lambda: load_slices(
                view, slice_map=wrong, rank=rank, parameters=parameters, adam=adam, control_group=None
            )
        )
    )
    return told


def test_load_errors_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    weights = {name: unsharded(name, "param") for name in sample_shapes()}
    weights["lm_head.weight"] = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"].view(-1)[-1] = float("inf")  # in the last rank's slice only
    torch.save({"model_state_dict": weights, "global_step": 3}, tmp_path / "nan.pth")
    (tmp_path / "tensor_parallel_checkpoint_step_9.pth").write_bytes(b"PK\3\4 torn")
    told = run_ranks(_errors_are_shared, 2, str(tmp_path))
    assert told[0] == told[1]
    assert "does not exist" in told[0][0]
    assert "none of the 1 checkpoints" in told[0][1] and "step_9.pth: 9 bytes, cut" in told[0][1]
    assert "embed_tokens.weight holds NaN or infinite" in told[0][2]


def _counted_load(rank: int, world_size: int, path: str) -> int:
    """Load the sample; slices that this rank sent or received."""
    view = open_view(path, rank)
    counts, start = [0], transfer.SlicePeers._start

    def counted(self: Any, call: Any, tensor: torch.Tensor, other: int) -> Any:
        counts[0] += 1
        return start(self, call, tensor, other)

    for without in ((), (1,)):  # the second time rank 1 is served, so that the count counts
        view = replace(view, reader=None if rank in without else view.reader, blind_ranks=without)
        transfer.SlicePeers._start = counted  # type: ignore[method-assign, assignment]
        try:
            assert_loaded(view, rank, world_size)
        finally:
            transfer.SlicePeers._start = start  # type: ignore[method-assign]
        if not without:
            assert counts[0] == 0
    return counts[0]


def test_ranks_that_can_read_the_file_are_sent_nothing(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)
    assert all(count > 0 for count in run_ranks(_counted_load, 2, str(path)))


def test_missing_adam_state_is_said_and_restored_nowhere(tmp_path: Path) -> None:
    weights = {name: unsharded(name, "param").bfloat16() for name in sample_shapes(tied=False)}
    path = tmp_path / "streaming_checkpoint_step_3.pth"
    torch.save({"model_state_dict": weights, "global_step": 3}, path)
    slice_map = sample_map(1, tied=False)
    parameters, adam = empty_slices(slice_map, 0)
    report = load_slices(
        open_view(str(path), 0),
        slice_map=slice_map,
        rank=0,
        parameters=parameters,
        adam=adam,
        control_group=None,
    )
    assert not report.optimizer_restored
    assert report.warnings == ("Adam starts from zero: the checkpoint has no optimizer state",)
    assert all(torch.equal(parameters[name], weight.float()) for name, weight in weights.items())
    assert all(float(state["exp_avg"].abs().sum()) == 0 for state in adam.values())


def test_another_models_checkpoint_is_refused_naming_both_shapes(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)
    slice_map = sample_map(1)
    parameters, adam = empty_slices(slice_map, 0)
    view = open_view(str(path), 0)
    view.shapes["norm.weight"] = (25,)
    with pytest.raises(
        CheckpointError, match=r"norm\.weight is \(25,\) in the checkpoint and \(24,\) in the"
    ):
        load_slices(view, slice_map=slice_map, rank=0, parameters=parameters, adam=adam, control_group=None)
