"""A save by several ranks: one file whoever writes which part, and no slice sent within a node."""

import errno
import os
import random
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.checkpoint import transfer
from argonne.checkpoint.archive import ArchiveWriter, tensor_bytes
from argonne.checkpoint.contents import begin_archive, build_tree, finish_archive, tensor_entries
from argonne.checkpoint.part_writer import PartWriter
from argonne.checkpoint.pieces import Piece
from argonne.checkpoint.reader import FORMAT_KEY, FORMAT_VERSION
from argonne.checkpoint.shared_memory import SharedMemory
from argonne.checkpoint.team import Team
from argonne.testing.checkpoint_samples import (
    PARAM_GROUP,
    sample_metadata,
    sample_shapes,
    save_sample,
    unsharded,
)
from argonne.testing.distributed import run_ranks
from tests.checkpoint.loading import outcome, small_chunks

NAME = "tensor_parallel_checkpoint_step_7.pth"


def front_to_back(path: Path) -> bytes:
    """The sample's file from whole tensors, by the writer of one stream: no slices, pieces or positions."""
    entries = tensor_entries(sample_shapes(), with_adam=True)
    tree = build_tree(entries, PARAM_GROUP, sample_metadata(), tied=True)
    tree[FORMAT_KEY] = FORMAT_VERSION
    with path.open("wb") as file:
        writer = ArchiveWriter(file.fileno())
        begin_archive(writer, tree)
        for index, entry in enumerate(entries):
            writer.add(f"data/{index}", bytes(tensor_bytes(unsharded(entry.name, entry.key))))
        for index in range(len(sample_shapes())):
            writer.add(f"data/step_{index}", bytes(tensor_bytes(torch.tensor(7.0))))
        finish_archive(writer)
    return path.read_bytes()


@small_chunks()
def _save(rank: int, world_size: int, folder: str, hosts: str, dp_size: int) -> list[int]:
    """Save between steps and from copies, rank r on ``hosts[r]``; slices that this rank sent or received."""
    counts: list[int] = []
    start, name = transfer.SlicePeers._start, socket.gethostname

    def counted(self: Any, call: Any, tensor: torch.Tensor, other: int) -> Any:
        counts[-1] += tensor.dtype == torch.float32
        return start(self, call, tensor, other)

    transfer.SlicePeers._start, socket.gethostname = counted, lambda: hosts[rank]  # type: ignore
    try:
        for how in ("steps", "copies"):
            counts.append(0)
            save_sample(
                Path(folder, how),
                rank=rank,
                tp_size=world_size // dp_size,
                dp_size=dp_size,
                from_copies=how == "copies",
            )
    finally:
        transfer.SlicePeers._start, socket.gethostname = start, name  # type: ignore
    return counts


@pytest.mark.parametrize(
    ("hosts", "dp_size"),
    [
        *(("a", 1), ("aa", 1), ("ab", 1), ("aabb", 2)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("aaaa", 1), ("aabb", 1), ("abab", 2))),
    ],
)
def test_the_file_of_one_stream(tmp_path: Path, hosts: str, dp_size: int) -> None:
    expected = front_to_back(tmp_path / NAME)
    sent = run_ranks(_save, len(hosts), str(tmp_path), hosts, dp_size)
    for how in ("steps", "copies"):
        written = tmp_path / how / NAME
        assert written.read_bytes() == expected
        assert [path.name for path in written.parent.iterdir()] == [NAME]
    content = torch.load(written, weights_only=True)
    for index, name in enumerate(sample_shapes()):
        assert torch.equal(content["model_state_dict"][name], unsharded(name, "param")), name
        state = content["optimizer_state_dict"]["state"][index]
        assert torch.equal(state["exp_avg"], unsharded(name, "exp_avg")) and float(state["step"]) == 7
        assert torch.equal(state["exp_avg_sq"], unsharded(name, "exp_avg_sq"))
    for counts in sent:
        assert all(count > 0 for count in counts) if len(set(hosts)) > 1 else counts == [0, 0], sent


def test_a_rank_that_cannot_open_the_file_sends_its_slices(tmp_path: Path) -> None:
    assert run_ranks(_closed_file, 2, str(tmp_path)) == [True, True]
    assert (tmp_path / NAME).read_bytes() == front_to_back(tmp_path / "expected")


@small_chunks()
def _closed_file(rank: int, world_size: int, folder: str) -> bool:
    opened = os.open

    def refused(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".saving"):
            raise OSError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    os.open = refused if rank == 1 else opened
    try:
        save_sample(Path(folder), rank=rank, tp_size=world_size)
    finally:
        os.open = opened
    return True


@small_chunks()
def _uneven_pace(rank: int, world_size: int, folder: str) -> bool:
    """Every rank dawdles at other rounds, in writing and in filling."""
    chance = random.Random(rank)
    write, put = PartWriter.write, Team.put

    def slow_write(self: PartWriter, piece: Piece, values: torch.Tensor) -> None:
        time.sleep(chance.choice((0, 0, 0.004)))
        write(self, piece, values)

    def slow_put(self: Team, pieces: Sequence[Piece]) -> None:
        time.sleep(chance.choice((0, 0, 0.008)))
        put(self, pieces)

    PartWriter.write, Team.put = slow_write, slow_put  # type: ignore[method-assign]
    try:
        save_sample(Path(folder), rank=rank, tp_size=world_size)
    finally:
        PartWriter.write, Team.put = write, put  # type: ignore[method-assign]
    return True


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_rank_fills_what_another_still_writes(tmp_path: Path, world_size: int) -> None:
    run_ranks(_uneven_pace, world_size, str(tmp_path))
    assert (tmp_path / NAME).read_bytes() == front_to_back(tmp_path / "expected")


@small_chunks()
def _short_of_memory(rank: int, world_size: int, folder: str) -> list[str]:
    """Rank 1 gets no memory for its window; then it does."""
    take = SharedMemory.take

    def short(self: SharedMemory, size: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    SharedMemory.take = short if rank == 1 else take  # type: ignore[method-assign]
    told = [outcome(lambda: save_sample(Path(folder), rank=rank, tp_size=world_size))]
    SharedMemory.take = take  # type: ignore[method-assign]
    dist.barrier()
    told.append(", ".join(os.listdir(folder)))
    dist.barrier()
    return [*told, outcome(lambda: save_sample(Path(folder), rank=rank, tp_size=world_size))]


def test_a_host_short_of_memory_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    told = run_ranks(_short_of_memory, 2, str(tmp_path))
    assert told[0] == told[1]
    message, left, later = told[0]
    assert re.fullmatch(
        r"checkpoint .* was not written: rank 1 cannot take [\d,]+ bytes of shared host memory "
        r"\(Cannot allocate memory\): free some",
        message,
    )
    assert (left, later) == ("", "no error")
    assert (tmp_path / NAME).read_bytes() == front_to_back(tmp_path / "expected")
