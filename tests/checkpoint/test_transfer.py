"""Slices between the ranks and rank 0: failures on either side."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.checkpoint import contents, rows, transfer
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError, PeerError
from argonne.testing.checkpoint_samples import (
    filled_slices,
    sample_map,
    save_sample,
    unsharded,
)
from argonne.testing.distributed import run_ranks
from tests.checkpoint.loading import outcome


def _rank_dies(rank: int, folder: str) -> None:
    """Rank 1 disappears at the sixth tensor; rank 0 writes down what it raised."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows.CHUNK_BYTES = 1000
    await_word, words = transfer.SlicePeers.await_word, [0]

    def dying(self: Any) -> None:
        words[0] += 1
        if words[0] == 6:
            os._exit(0)
        await_word(self)

    transfer.SlicePeers.await_word = dying  # type: ignore[method-assign]
    try:
        save_sample(Path(folder), rank=rank, tp_size=2)
    except PeerError as error:
        Path(folder, "told").write_text(str(error))
    os._exit(0)


def test_a_rank_that_dies_is_named_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path, step=5)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank_dies, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "told").read_text().startswith("rank 1 left while a checkpoint was saved")
    assert sorted(child.name for child in tmp_path.glob("*[!.]*") if "checkpoint" in child.name) == [
        path.name
    ]
    verify_checkpoint(path)


def _gather(rank: int, world_size: int, fail_at: int) -> list[str]:
    """Rank 0 writes two tensors whose ``fail_at``-th chunk fails, and stops; then all of one tensor."""
    rows.CHUNK_BYTES = 1000
    slice_map = sample_map(world_size)
    parameters, adam = filled_slices(slice_map, rank)
    name = "blocks.0.mlp.down_proj.weight"
    entry = contents.TensorEntry(name, "param", slice_map.shape(name))
    if rank != 0:
        told = outcome(lambda: transfer.send_slices([entry, entry], slice_map, rank, parameters, adam, None))
        transfer.send_slices([entry], slice_map, rank, parameters, adam, None)
        return [told]
    peers = transfer.SlicePeers(range(1, world_size), None)
    written: list[torch.Tensor] = []

    def write(chunk: torch.Tensor) -> None:
        if len(written) == fail_at:
            raise CheckpointError("no more")
        written.append(chunk.clone())

    peers.go()
    told = outcome(lambda: transfer.gather_tensor(entry, slice_map, parameters[name], peers, write))
    assert len(written) == fail_at
    peers.stop("rank 0 said so")
    written, fail_at = [], -1
    peers.go()
    transfer.gather_tensor(entry, slice_map, parameters[name], peers, write)
    peers.go()
    assert torch.equal(torch.cat(written), unsharded(name, "param"))
    return [told]


@pytest.mark.parametrize("fail_at", [0, 2])
def test_a_failed_write_ends_the_tensor_and_leaves_the_channel_clean(fail_at: int) -> None:
    assert run_ranks(_gather, 2, fail_at) == [["no more"], ["rank 0 said so"]]
