"""Gloo ranks for tests: started once per number of ranks and used again, since importing takes seconds."""

import atexit
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from argonne.ranks.world import Parallel, World, build_parallel, replicas_of_a_node


def _rank_main(rank: int, world_size: int, folder: str, tasks: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pickle.loads(tasks.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            outcome: tuple[bool, Any] = (True, function(rank, world_size, *args))
        except BaseException:  # noqa: BLE001
            # The process boundary: a failed assertion, pytest.fail and SystemExit alike belong in the report
            # of the test that called, and a rank that ended here would tell it nothing.
            outcome = (False, traceback.format_exc())
        tasks.send_bytes(pickle.dumps(outcome))


class _Ranks:
    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.mkdtemp()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, world_size, self.folder, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        payload = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(payload)
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            waiting = [rank for rank in range(len(self.pipes)) if rank not in results]
            for rank in waiting:
                if not self.pipes[rank].poll(0.01):
                    assert self.processes[rank].is_alive(), f"rank {rank} died"
                    continue
                try:
                    succeeded, value = pickle.loads(self.pipes[rank].recv_bytes())
                except EOFError:
                    self.processes[rank].join(5)
                    raise AssertionError(f"rank {rank} died: {self.processes[rank].exitcode}") from None
                assert succeeded, f"rank {rank} raised:\n{value}"
                results[rank] = value
            assert time.monotonic() < deadline, f"no result within {timeout:.0f} s from ranks {waiting}"
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


_pools: dict[int, _Ranks] = {}
_LARGEST_KEPT = 4


def _drop(world_size: int) -> None:
    pool = _pools.pop(world_size, None)
    if pool is not None:
        pool.close()


def _drop_all() -> None:
    for world_size in list(_pools):
        _drop(world_size)


atexit.register(_drop_all)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on ``world_size`` gloo ranks; return their results by rank.

    The function must be importable (module level) and its result picklable. The first rank that raises
    ends all and its traceback becomes the AssertionError. Ranks live on between calls: a function leaves
    no global state behind.
    """
    if world_size not in _pools:
        _pools[world_size] = _Ranks(world_size)
    usable = False
    try:
        results = _pools[world_size].run(function, args, timeout)
        usable = world_size <= _LARGEST_KEPT
        return results
    finally:
        if not usable:
            _drop(world_size)


def make_parallel(rank: int, world_size: int, tp_size: int, *, node_size: int | None = None) -> Parallel:
    """The degrees of a test's ranks, without the groups that only the training loop needs. Collective.

    ``node_size``: ranks of a node, within which replicas share weights (hsdp).
    """
    world = World(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=node_size or world_size,
        device=torch.device("cpu"), control_group=None, feed_group=None,
    )  # fmt: skip
    shards = None
    if node_size is not None:
        shards = replicas_of_a_node(tp_size, world_size=world_size, node_size=node_size)
    return build_parallel(world, tp_size, shard_size=shards)
