"""Saves from copies: the same file whoever writes which part, nothing sent within a node, faults heard."""

import errno
import os
import random
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.checkpoint import transfer
from argonne.checkpoint.host_copy import HostCopy
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.checkpoint_samples import (
    empty_slices,
    filled_slices,
    sample_map,
    sample_metadata,
    save_sample,
)
from argonne.testing.distributed import run_ranks
from tests.checkpoint.loading import outcome, small_chunks


@small_chunks()
def _save(
    rank: int,
    world_size: int,
    folder: str,
    hosts: list[str],
    dp_size: int = 1,
    shard_size: int | None = None,
) -> int:
    """Save from copies where rank r runs on ``hosts[r]``; tensors that this rank sent or received."""
    sent = [0]
    start, name = transfer.SlicePeers._start, socket.gethostname

    def counted(self: Any, *args: Any) -> Any:
        sent[0] += 1
        return start(self, *args)

    transfer.SlicePeers._start, socket.gethostname = counted, lambda: hosts[rank]  # type: ignore
    try:
        save_sample(
            Path(folder), rank=rank, tp_size=world_size // dp_size, dp_size=dp_size, shard_size=shard_size,
            from_copies=True,
        )  # fmt: skip
    finally:
        transfer.SlicePeers._start, socket.gethostname = start, name  # type: ignore
    return sent[0]


@pytest.mark.parametrize(
    ("hosts", "dp_size"),
    [
        *(("a", 1), ("aa", 1), ("ab", 1), ("aabb", 2)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("aaaa", 1), ("aabb", 1), ("abab", 2))),
    ],
)
def test_the_file_of_a_save_by_rank_0_alone(tmp_path: Path, hosts: str, dp_size: int) -> None:
    expected, _ = save_sample(tmp_path / "alone")
    sent = run_ranks(_save, len(hosts), str(tmp_path / "several"), list(hosts), dp_size)
    written = tmp_path / "several" / expected.name
    verify_checkpoint(written)
    assert written.read_bytes() == expected.read_bytes()
    assert all(count > 0 for count in sent) if len(set(hosts)) > 1 else sent == [0] * len(hosts)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_replicas_on_another_node_write_and_send_nothing(tmp_path: Path) -> None:
    """hsdp: rank 0's node has all of the model, so that nothing crosses."""
    expected, _ = save_sample(tmp_path / "alone")
    assert run_ranks(_save, 4, str(tmp_path / "several"), list("aabb"), 4, 2) == [0] * 4
    assert (tmp_path / "several" / expected.name).read_bytes() == expected.read_bytes()


@small_chunks()
def _failing_saves(rank: int, world_size: int, folder: str, hosts: str) -> dict[str, str]:
    """Every way a save can fail on each rank; then one that succeeds."""
    told: dict[str, str] = {}
    write, sync, name = os.write, os.fsync, socket.gethostname
    socket.gethostname = lambda: hosts[rank]

    def save(**more: Any) -> str:
        return outcome(
            lambda: save_sample(Path(folder), rank=rank, tp_size=world_size, from_copies=True, **more)
        )

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def failing_sync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for victim in range(world_size):
        os.write = full if rank == victim else write
        told[f"full {victim}"] = save()
        os.write = write
        spoil = ("blocks.1.mlp.up_proj.weight", "param", float("nan")) if rank == victim else None
        told[f"nan {victim}"] = save(spoil=spoil)
    os.fsync = failing_sync if rank == 0 else sync  # type: ignore[assignment]
    told["fsync"] = save()
    os.fsync = sync
    told["space"] = save(spare_bytes=1 << 60)
    told["metadata"] = save(metadata={**sample_metadata(), "loss": torch.zeros(1).numpy()[0]})
    dist.barrier()
    told["left"] = ", ".join(sorted(os.listdir(folder)))
    dist.barrier()
    told["at last"] = save()
    socket.gethostname = name
    return told


@pytest.mark.parametrize("hosts", ["aa", "ab"])
def test_failures_reach_all_ranks_and_leave_the_folder_as_it_was(tmp_path: Path, hosts: str) -> None:
    before, _ = save_sample(tmp_path, step=5)
    told = run_ranks(_failing_saves, 2, str(tmp_path), hosts)
    assert told[0] == told[1]
    expected = {
        "full 0": "could not be written: .* is full",
        "full 1": "could not be written: .* is full" if hosts == "aa" else "no error",  # it writes nothing
        "nan 0": r"was not written: blocks\.1\.mlp\.up_proj\.weight holds NaN or infinite",
        "nan 1": r"was not written: blocks\.1\.mlp\.up_proj\.weight holds NaN or infinite",
        "fsync": "Input/output error",
        "space": r"needs 1,152,921,504,[\d,]+ bytes free and has [\d,]+: make room",
        "metadata": "holds a numpy.float32",
        "at last": "no error",
    }
    for what, pattern in expected.items():
        assert re.search(pattern, told[0][what]), (what, told[0][what])
    assert not any(name.endswith(".saving") for name in told[0]["left"].split(", "))
    verify_checkpoint(before.with_name("tensor_parallel_checkpoint_step_7.pth"))


def test_copies_are_used_again_and_hold_the_last_values(tmp_path: Path) -> None:
    slice_map = sample_map(2)
    with HostCopy(slice_map, 1, torch.device("cpu")) as copy:
        places = {name: value.data_ptr() for name, value in copy.parameters.items()}
        copy.take(empty_slices(slice_map, 1)[0], {})
        assert copy.adam == {} and not any(value.any() for value in copy.parameters.values())
        parameters, adam = filled_slices(slice_map, 1)
        copy.take(parameters, adam)
        for name, value in copy.parameters.items():
            assert value.data_ptr() == places[name]
            if value.numel():
                assert torch.equal(value, parameters[name])
                assert all(torch.equal(copy.adam[name][key], adam[name][key]) for key in adam[name])
        for state in adam.values():
            state["step"].add_(1)
        assert all(float(state["step"]) == 7 for state in copy.adam.values())


def test_memory_that_is_not_the_copy_is_out_of_reach() -> None:
    """The place of a copy in another container may be another process's file here."""
    slice_map = sample_map(1)
    with (
        HostCopy(slice_map, 0, torch.device("cpu")) as copy,
        HostCopy(slice_map, 0, torch.device("cpu")) as other,
    ):
        assert copy.peer(other.place, slice_map, 0) is not None
        for wrong in ({"pid": 1 << 22}, {"token": random.Random(1).randbytes(16)}, {"size": 1 << 40}):
            place = type(other.place)(**{**vars(other.place), **wrong})
            assert copy.peer(place, slice_map, 0) is None, wrong
        assert copy.peer(type(other.place)(**{**vars(other.place), "host": "b"}), slice_map, 0) is None


def test_a_rank_that_cannot_open_the_file_sends_its_slices(tmp_path: Path) -> None:
    assert run_ranks(_closed_file, 2, str(tmp_path)) == [True, True]
    verify_checkpoint(tmp_path / "tensor_parallel_checkpoint_step_7.pth")


@small_chunks()
def _closed_file(rank: int, world_size: int, folder: str) -> bool:
    opened = os.open

    def refused(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".saving"):
            raise OSError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    os.open = refused if rank == 1 else opened
    try:
        save_sample(Path(folder), rank=rank, tp_size=world_size, from_copies=True)
    finally:
        os.open = opened
    return True
