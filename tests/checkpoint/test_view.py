"""One checkpoint on all ranks: those without the file are served by rank 0."""

import contextlib
from pathlib import Path

from argonne.testing.checkpoint_samples import (
    sample_metadata,
    save_sample,
)
from argonne.testing.distributed import run_ranks
from tests.checkpoint.loading import assert_loaded, open_view


def _blind_ranks(rank: int, world_size: int, paths: list[str]) -> tuple[int, ...]:
    """Rank 0 has one file; rank 1 has none at that path, rank 2 another of the same size."""
    with contextlib.chdir(paths[rank]):
        view = open_view("tensor_parallel_checkpoint_step_7.pth", rank)
    assert view.step == 7 and (view.reader is None) == (rank in view.blind_ranks)
    assert_loaded(view, rank, world_size)
    return view.blind_ranks


def test_ranks_without_the_file_are_served_by_rank_0(tmp_path: Path) -> None:
    folders = [tmp_path / str(rank) for rank in range(4)]
    for folder in folders:
        folder.mkdir()
    path, _ = save_sample(folders[0])
    (folders[3] / path.name).write_bytes(path.read_bytes())
    other, _ = save_sample(folders[2], metadata={**sample_metadata(), "loss": 9.5})
    assert other.stat().st_size == path.stat().st_size
    assert run_ranks(_blind_ranks, 4, [str(folder) for folder in folders]) == [(1, 2)] * 4
