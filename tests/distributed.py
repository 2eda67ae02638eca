"""Start gloo ranks for a test and bring back what each returned."""

import multiprocessing
import os
import pickle
import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        outcome: tuple[bool, Any] = (True, function(rank, world_size, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    results.put((rank, outcome[0], pickle.dumps(outcome[1])))
    if outcome[0]:
        dist.barrier()
        dist.destroy_process_group()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on ``world_size`` gloo ranks; return their results by rank.

    The function must be importable (module level) and its result picklable. The first rank that raises
    ends all and its traceback becomes the AssertionError.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    collected: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(function, rank, world_size, folder, args, results), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            for _ in range(world_size):
                try:
                    rank, succeeded, payload = results.get(timeout=timeout)
                except queue.Empty:
                    missing = sorted(set(range(world_size)) - set(collected))
                    raise AssertionError(f"no result within {timeout:.0f} s from ranks {missing}") from None
                value = pickle.loads(payload)
                assert succeeded, f"rank {rank} raised:\n{value}"
                collected[rank] = value
            for process in processes:
                process.join(timeout=timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
    return [collected[rank] for rank in range(world_size)]
