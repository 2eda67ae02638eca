"""Saving and loading over gloo ranks: any layout to any other, and failures that reach all ranks."""

import errno
import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import (
    MODEL_CONFIG,
    empty_slices,
    filled_slices,
    sample_map,
    sample_metadata,
    save_sample,
)
from argonne.testing.distributed import run_ranks
from checkpointing import (
    clean_temporary_files,
    load_slices,
)
from tests.checkpoint.loading import assert_loaded, open_view, outcome, small_chunks


@small_chunks()
def _save_and_load(rank: int, world_size: int, folder: str) -> bytes:
    """Save at this layout, load it and the layouts before; tensor parallel, and tp x FSDP at four ranks."""
    target = Path(folder) / f"tp{world_size}"
    path, report = save_sample(target, rank=rank, tp_size=world_size)
    assert (report is not None) == (rank == 0)
    for earlier in (1, 2, 4):
        other = Path(folder) / f"tp{earlier}" / path.name
        if earlier <= world_size:
            assert_loaded(open_view(str(other), rank), rank, world_size)
    if world_size == 4:
        mixed, _ = save_sample(Path(folder) / "mixed", rank=rank, tp_size=2, dp_size=2)
        hybrid, _ = save_sample(Path(folder) / "hybrid", rank=rank, dp_size=4, shard_size=2)
        for one in (mixed, path, hybrid):
            assert_loaded(open_view(str(one), rank), rank, 2, 2)
            assert_loaded(open_view(str(one), rank), rank, 1, 4, shard_size=2)
        if rank == 0:
            assert mixed.read_bytes() == path.read_bytes() == hybrid.read_bytes()
    return path.read_bytes() if rank == 0 else b""


def test_any_layout_to_any_other_bit_for_bit(tmp_path: Path) -> None:
    files = [run_ranks(_save_and_load, world_size, str(tmp_path))[0] for world_size in (1, 2, 4)]
    assert files[0] == files[1] == files[2]  # a file does not depend on the layout that wrote it
    four = tmp_path / "tp4" / "tensor_parallel_checkpoint_step_7.pth"
    for tp_size in (1, 2):  # down again, rank by rank in this process
        for rank in range(tp_size):
            slice_map = sample_map(tp_size)
            parameters, adam = empty_slices(slice_map, rank)
            view = open_view(str(four), 0)
            load_slices(
                view, slice_map=slice_map, rank=rank, parameters=parameters, adam=adam, control_group=None
            )
            for name, expected in filled_slices(slice_map, rank)[0].items():
                assert torch.equal(parameters[name], expected)


@small_chunks()
def _uneven_save(rank: int, world_size: int, folder: str, dp_size: int) -> bytes:
    """Save where the degree does not divide the heads; load that, and what one rank has saved."""
    tp_size = world_size // dp_size
    path, _ = save_sample(Path(folder) / f"uneven{world_size}", rank=rank, tp_size=tp_size, dp_size=dp_size)
    for one in (path, Path(folder) / "tp1" / path.name):
        assert_loaded(open_view(str(one), rank), rank, tp_size, dp_size)
    return path.read_bytes() if rank == 0 else b""


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "dp_size"), [(3, 1), (6, 2)])
def test_a_degree_that_does_not_divide_the_heads(tmp_path: Path, world_size: int, dp_size: int) -> None:
    expected = run_ranks(_save_and_load, 1, str(tmp_path))[0]
    assert run_ranks(_uneven_save, world_size, str(tmp_path), dp_size)[0] == expected
    path = tmp_path / f"uneven{world_size}" / "tensor_parallel_checkpoint_step_7.pth"
    assert_loaded(open_view(str(path), 0), 0, 1)


@small_chunks()
def _failing_saves(rank: int, world_size: int, folder: str) -> dict[str, str]:
    """Every way a save can fail on rank 0 or by another rank's values; then one that succeeds."""
    told: dict[str, str] = {}
    write, written = os.write, [0]

    def full(descriptor: int, data: Any) -> int:
        written[0] += len(data)
        if written[0] > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    for limit in (0, 9000, 60_000, 170_000):
        written[0] = 0
        if rank == 0:
            os.write = full
        told[f"full at {limit}"] = outcome(lambda: save_sample(Path(folder), rank=rank, tp_size=world_size))
        os.write = write
    sync = os.fsync

    def failing_sync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if rank == 0:
        os.fsync = failing_sync  # type: ignore[assignment]
    told["fsync"] = outcome(lambda: save_sample(Path(folder), rank=rank, tp_size=world_size))
    os.fsync = sync
    for what, spoiled_rank, spoil in (
        ("nan", 1, ("blocks.1.mlp.up_proj.weight", "param", float("nan"))),
        ("inf", 0, ("embed_tokens.weight", "exp_avg", float("inf"))),
    ):
        mine = spoil if rank == spoiled_rank else None
        told[what] = outcome(
            lambda mine=mine: save_sample(Path(folder), rank=rank, tp_size=world_size, spoil=mine)
        )
    told["space"] = outcome(
        lambda: save_sample(Path(folder), rank=rank, tp_size=world_size, spare_bytes=1 << 60)
    )
    bad = {**sample_metadata(), "loss": torch.zeros(1).numpy()[0]}
    told["metadata"] = outcome(lambda: save_sample(Path(folder), rank=rank, tp_size=world_size, metadata=bad))
    told["left"] = ", ".join(sorted(os.listdir(folder)))
    dist.barrier()
    path, _ = save_sample(Path(folder), rank=rank, tp_size=world_size)
    assert_loaded(open_view(str(path), rank), rank, world_size)
    return told


def test_failures_reach_all_ranks_and_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    save_sample(tmp_path, step=5)
    before = (tmp_path / "tensor_parallel_checkpoint_step_5.pth").read_bytes()
    told = run_ranks(_failing_saves, 2, str(tmp_path))
    assert told[0] == told[1]
    expected = {
        "full at 0": "is full",
        "full at 9000": "is full",
        "full at 60000": "is full",
        "full at 170000": "is full",
        "fsync": "Input/output error",
        "nan": r"blocks\.1\.mlp\.up_proj\.weight holds NaN or infinite",
        "inf": r"exp_avg of embed_tokens\.weight holds NaN or infinite",
        "space": r"needs 1,152,921,504,[\d,]+ bytes free and has [\d,]+: make room",
        "metadata": "holds a numpy.float32",
        "left": r"^tensor_parallel_checkpoint_step_5\.pth$",
    }
    for what, pattern in expected.items():
        assert re.search(pattern, told[0][what]), (what, told[0][what])
    assert (tmp_path / "tensor_parallel_checkpoint_step_5.pth").read_bytes() == before


def test_file_size_limit_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written: File too large"):
            save_sample(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written: "):
        save_sample(tmp_path / "file")


def test_model_config_is_in_the_file(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)
    assert verify_checkpoint(path).metadata["model_config"] == {**MODEL_CONFIG, "tie_word_embeddings": True}
    assert clean_temporary_files(tmp_path) == []
