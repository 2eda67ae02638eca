"""Saving and loading over gloo ranks: any layout to any other, and failures that reach all ranks."""

import errno
import os
import re
import resource
import signal
import socket
from collections.abc import Callable
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
        assert_loaded(open_view(str(mixed), rank), rank, 2, 2)
        assert_loaded(open_view(str(path), rank), rank, 2, 2)
        hybrid: dict[str, Any] = {"tp_size": 1, "dp_size": 4, "shard_size": 2}  # two nodes with a copy each
        nodes, _ = save_sample(Path(folder) / "hsdp", rank=rank, **hybrid)
        copied, _ = save_sample(Path(folder) / "background", rank=rank, **hybrid, from_copies=True)
        if rank == 0:
            assert mixed.read_bytes() == path.read_bytes()
            assert nodes.read_bytes() == copied.read_bytes() == path.read_bytes()
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


def _no_space(limit: int) -> Callable[[int, Any], int]:
    """``os.write`` on a disk that is full after ``limit`` bytes."""
    write, written = os.write, [0]

    def full(descriptor: int, data: Any) -> int:
        written[0] += len(data)
        if written[0] > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    return full


def _failing_sync(descriptor: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


@small_chunks()
def _failing_saves(rank: int, world_size: int, folder: str, hosts: str, copies: bool) -> dict[str, str]:
    """Every way a save can fail on each rank or by its values; then one that succeeds."""
    told: dict[str, str] = {}
    write, sync, name = os.write, os.fsync, socket.gethostname
    socket.gethostname = lambda: hosts[rank]

    def save(**more: Any) -> str:
        def call() -> None:
            save_sample(Path(folder), rank=rank, tp_size=world_size, from_copies=copies, **more)

        return outcome(call)

    for victim in range(world_size):
        for limit in (0, 9000, 60_000):
            os.write = _no_space(limit) if rank == victim else write
            told[f"full {victim} at {limit}"] = save()
            os.write = write
    for what, victim, spoil in (
        ("nan 0", 0, ("blocks.1.mlp.up_proj.weight", "param", float("nan"))),
        ("nan 1", 1, ("blocks.1.mlp.up_proj.weight", "param", float("nan"))),
        ("inf", 0, ("embed_tokens.weight", "exp_avg", float("inf"))),
    ):
        told[what] = save(spoil=spoil if rank == victim else None)
    os.fsync = _failing_sync if rank == 0 else sync  # type: ignore[assignment]
    told["fsync"] = save()
    os.fsync = sync
    told["space"] = save(spare_bytes=1 << 60)
    told["metadata"] = save(metadata={**sample_metadata(), "loss": torch.zeros(1).numpy()[0]})
    dist.barrier()
    told["left"] = ", ".join(sorted(os.listdir(folder)))
    dist.barrier()
    told["at last"] = save()
    socket.gethostname = name
    path = Path(folder) / "tensor_parallel_checkpoint_step_7.pth"
    assert_loaded(open_view(str(path), rank), rank, world_size)
    return told


@pytest.mark.parametrize(("hosts", "copies"), [("aa", False), ("aa", True), ("ab", False)])
def test_failures_reach_all_ranks_and_leave_the_folder_as_it_was(
    tmp_path: Path, hosts: str, copies: bool
) -> None:
    save_sample(tmp_path, step=5)
    before = (tmp_path / "tensor_parallel_checkpoint_step_5.pth").read_bytes()
    told = run_ranks(_failing_saves, 2, str(tmp_path), hosts, copies)
    assert told[0] == told[1]
    full, alone = "could not be written: .* is full", hosts == "ab"  # rank 1 writes nothing then
    expected = {
        **{f"full 0 at {limit}": full for limit in (0, 9000, 60_000)},
        **{f"full 1 at {limit}": "no error" if alone else full for limit in (0, 9000, 60_000)},
        "nan 0": r"was not written: blocks\.1\.mlp\.up_proj\.weight holds NaN or infinite",
        "nan 1": r"was not written: blocks\.1\.mlp\.up_proj\.weight holds NaN or infinite",
        "inf": r"was not written: exp_avg of embed_tokens\.weight holds NaN or infinite",
        "fsync": "Input/output error",
        "space": r"needs 1,152,921,504,[\d,]+ bytes free and has [\d,]+: make room",
        "metadata": "holds a numpy.float32",
        "left": r"^tensor_parallel_checkpoint_step_5\.pth$",
        "at last": "no error",
    }
    if alone:
        expected["left"] = r"^tensor_parallel_checkpoint_step_5\.pth, tensor_parallel_checkpoint_step_7\.pth$"
    assert told[0].keys() == expected.keys()
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
