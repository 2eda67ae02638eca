"""Open and load sample checkpoints on a rank, with every bit compared."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from argonne.checkpoint import rows, streamed_file
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import (
    empty_slices,
    filled_slices,
    sample_map,
)
from checkpointing import (
    CheckpointView,
    load_slices,
    open_chosen,
)


def open_view(path: str, rank: int) -> CheckpointView:
    view, _, _ = open_chosen(path, Path(), force_from_scratch=False, rank=rank, control_group=None)
    assert view is not None
    return view


def assert_loaded(
    view: CheckpointView, rank: int, tp_size: int, dp_size: int = 1, shard_size: int | None = None
) -> None:
    """Load into empty slices and compare every bit with what this rank should hold."""
    slice_map = sample_map(tp_size, dp_size=dp_size, shard_size=shard_size)
    parameters, adam = empty_slices(slice_map, rank)
    report = load_slices(
        view, slice_map=slice_map, rank=rank, parameters=parameters, adam=adam, control_group=None
    )
    assert report.optimizer_restored and not report.warnings
    expected_parameters, expected_adam = filled_slices(slice_map, rank)
    for name, expected in expected_parameters.items():
        assert torch.equal(parameters[name], expected), name
        for key, state in expected_adam[name].items():
            assert torch.equal(adam[name][key], state), (name, key)


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Several chunks a tensor and many writes a file, although both are small."""
    usual = rows.CHUNK_BYTES, streamed_file.BUFFER_BYTES
    rows.CHUNK_BYTES, streamed_file.BUFFER_BYTES = 1000, 4096
    try:
        yield
    finally:
        rows.CHUNK_BYTES, streamed_file.BUFFER_BYTES = usual


def outcome(call: Any) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "no error"
