"""Several ranks of one node against the raw disk: saves between two steps and from copies, and loads."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.benchmarks.checkpoint_raw import forget, raw_direct_write, raw_read, raw_write, tensors_of
from argonne.benchmarks.common import Row, interleaved, timed_row
from argonne.benchmarks.models import Shape, our_model, split_over
from argonne.checkpoint.parts import open_any
from argonne.checkpoint.view import view_of
from argonne.testing.distributed import run_ranks
from argonne.training.build import TrainedModel
from checkpointing import CheckpointView, HostCopy, load_slices, open_chosen, save_checkpoint


def save_arguments(trained: TrainedModel, shape: Shape) -> dict[str, Any]:
    """What both ways to save take, the slices apart."""
    return {
        "slice_map": trained.slice_map,
        "rank": trained.parallel.rank,
        "param_group": {"lr": 1e-4},
        "metadata": {"global_step": 1, "model_config": shape.settings()},
        "tied": True,
        "control_group": trained.parallel.control_group,
    }


def one_rank(rank: int, world_size: int, folder: str, shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way on this rank; rank 0 also writes as many raw bytes, while the others wait."""
    trained = our_model(shape, split_over(world_size))
    path = Path(folder) / "tensor_parallel_checkpoint_step_1.pth"
    common, size = save_arguments(trained, shape), 12 * trained.slice_map.numel()
    raw = {"0": torch.rand(size // 8), "1": torch.rand(size // 8)} if rank == 0 else tensors_of(trained)
    copy = HostCopy(trained.slice_map, rank, trained.parallel.device)
    copy.take(trained.parameters(), trained.adam())

    def timed(call: Callable[[], object], on: int | None = None) -> Callable[[], float]:
        def run() -> float:
            if rank == 0:  # new pages of the page cache cost more: every way begins with used ones
                raw_write(raw, path)
                path.unlink()
            dist.barrier()
            started = time.perf_counter()
            if on in (None, rank):
                call()
            dist.barrier()
            seconds = time.perf_counter() - started
            if rank == 0:
                path.unlink(missing_ok=True)
            return seconds

        return run

    return interleaved(
        {
            "raw": timed(lambda: raw_write(raw, path), on=0),
            "raw direct": timed(lambda: raw_direct_write(size, path), on=0),
            "between": timed(
                lambda: save_checkpoint(path, parameters=trained.parameters(), adam=trained.adam(), **common)
            ),
            "copies": timed(
                lambda: save_checkpoint(path, parameters=copy.parameters, adam=copy.adam, **common)
            ),
            "copy": timed(lambda: copy.take(trained.parameters(), trained.adam())),
        },
        rounds,
    )


def one_loading_rank(
    rank: int, world_size: int, folder: str, shape: Shape, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a load on this rank, the file not cached; rank 0 also reads the bytes raw."""
    trained = our_model(shape, split_over(world_size))
    path = Path(folder) / "tensor_parallel_checkpoint_step_1.pth"
    parameters, adam, common = trained.parameters(), trained.adam(), save_arguments(trained, shape)
    save_checkpoint(path, parameters=parameters, adam=adam, **common)
    group = trained.parallel.control_group

    def timed(call: Callable[[], object], on: int | None = None) -> Callable[[], float]:
        def run() -> float:
            gc.collect()  # a file that is mapped stays in the page cache
            dist.barrier()
            if rank == 0:
                forget(path)
            dist.barrier()
            started = time.perf_counter()
            if on in (None, rank):
                call()
            dist.barrier()
            return time.perf_counter() - started

        return run

    def fill(view: CheckpointView) -> None:
        load_slices(
            view,
            slice_map=trained.slice_map,
            rank=rank,
            parameters=parameters,
            adam=adam,
            control_group=group,
        )

    def resume() -> None:
        view, _, _ = open_chosen(
            str(path), Path(folder), force_from_scratch=False, rank=rank, control_group=group
        )
        assert view is not None and not view.blind_ranks
        fill(view)

    seconds = interleaved(
        {
            "raw": timed(lambda: raw_read(path), on=0),
            "load": timed(lambda: fill(view_of(open_any(path)))),
            "resume": timed(resume),
        },
        rounds,
    )
    dist.barrier()
    if rank == 0:
        path.unlink()
    return seconds


def rank_rows(folder: Path, shape: Shape, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows for 2 and 4 ranks, and the seconds behind them."""
    rows, data = [], {}
    for world_size in (2, 4):
        seconds = run_ranks(one_rank, world_size, str(folder), shape, rounds, timeout=900.0)[0]
        data[f"{world_size} ranks"] = seconds
        for what, key in (("from copies", "copies"), ("between steps", "between")):
            for disk in ("raw", "raw direct"):
                name = f"{world_size} ranks, save {what} / {disk} write"
                rows.append(timed_row(name, seconds[key], seconds[disk]))
        rows.append(timed_row(f"{world_size} ranks, copy / raw write", seconds["copy"], seconds["raw"]))
        loads = run_ranks(one_loading_rank, world_size, str(folder), shape, rounds, timeout=900.0)[0]
        data[f"{world_size} ranks, load"] = loads
        for what, key in (("load at", "load"), ("verify and load at", "resume")):
            rows.append(timed_row(f"{what} tp {world_size} / raw read", loads[key], loads["raw"]))
    return rows, data
