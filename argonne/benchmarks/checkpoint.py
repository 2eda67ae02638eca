"""Checkpoints: time to save against a raw write and the usual formats, and the memory of save and load."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.benchmarks.checkpoint_ranks import rank_rows, save_arguments
from argonne.benchmarks.checkpoint_raw import raw_direct_write, raw_write, tensors_of
from argonne.benchmarks.common import ROUNDS, Report, Row, interleaved, summary, timed_row
from argonne.benchmarks.memory_probe import PeakMemory, measure_load
from argonne.benchmarks.models import Shape, alone, our_model, split_over
from argonne.testing.distributed import run_ranks
from argonne.training.build import TrainedModel
from checkpointing import save_checkpoint

SHAPE = Shape(
    hidden_size=768, layers=6, heads=12, key_value_heads=4, intermediate_size=2048, vocab_size=32768
)
"""63 million parameters: 760 MB with Adam's state, the largest tensor 100 MB."""


def save(trained: TrainedModel, path: Path) -> int:
    """Bytes of the checkpoint written (0 on other ranks); collective."""
    common = save_arguments(trained, SHAPE)
    report = save_checkpoint(path, parameters=trained.parameters(), adam=trained.adam(), **common)
    return 0 if report is None else report.size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def writers(trained: TrainedModel, folder: Path) -> dict[str, Callable[[], float]]:
    """Each writes a new file, makes it durable, and returns the seconds; the file is then removed."""
    from safetensors.torch import save_file

    tensors = tensors_of(trained)
    size = sum(tensor.nbytes for tensor in tensors.values())

    def torch_save(path: Path) -> None:
        torch.save(tensors, path)
        _sync(path)

    def safetensors(path: Path) -> None:
        save_file(tensors, str(path))
        _sync(path)

    def timed(write: Callable[[Path], Any]) -> Callable[[], float]:
        def run() -> float:
            path = folder / "tensor_parallel_checkpoint_step_1.pth"
            # On a virtual machine, pages of the page cache that are new to it cost several times those used
            # just before: every variant begins with such pages.
            raw_write(tensors, path)
            path.unlink()
            start = time.perf_counter()
            write(path)
            seconds = time.perf_counter() - start
            path.unlink()
            return seconds

        return run

    return {
        "ours": timed(lambda path: save(trained, path)),
        "raw": timed(lambda path: raw_write(tensors, path)),
        "torch.save": timed(torch_save),
        "safetensors": timed(safetensors),
        "raw direct": timed(lambda path: raw_direct_write(size, path)),
    }


def save_memory_rank(rank: int, world_size: int, folder: str) -> int:
    """This rank's memory above what it had, while a split model is saved."""
    trained = our_model(SHAPE, split_over(world_size))
    dist.barrier()
    path = Path(folder) / "tensor_parallel_checkpoint_step_2.pth"
    with PeakMemory() as memory:
        save(trained, path)
    return memory.extra


def memory_rows(trained: TrainedModel, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    path = folder / "tensor_parallel_checkpoint_step_1.pth"
    save(trained, path)
    loads = {kind: measure_load(path, kind, SHAPE.settings(), 2) for kind in ("ours", "torch.load")}
    path.unlink()
    extra = run_ranks(save_memory_rank, 2, str(folder))
    largest = 4 * max(parameter.numel() for parameter in trained.parameters().values())
    ours, peer = loads["ours"], loads["torch.load"]
    rows = [
        Row(name="save over 2 ranks: extra memory of rank 0 / largest tensor", ours=extra[0], peer=largest,
            unit="B", target=2.0),
        Row(name="load at tp 2: memory / slices", ours=ours["extra"], peer=ours["slices"], unit="B",
            target=1.1),
        Row(name="load at tp 2: memory / torch.load and copy", ours=ours["extra"], peer=peer["extra"],
            unit="B"),
    ]  # fmt: skip
    return rows, {"loads": loads, "save_extra": extra, "largest": largest}


def run(rounds: int = ROUNDS) -> Report:
    trained = our_model(SHAPE, alone())
    size = sum(tensor.numel() * 4 for tensor in tensors_of(trained).values())
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        seconds = interleaved(writers(trained, folder), rounds)
        rows, data = memory_rows(trained, folder)
        more, of_ranks = rank_rows(folder, SHAPE, rounds)
    ours = seconds["ours"]
    return Report(
        name="checkpoint",
        title=f"Checkpoints: {size / 1e6:,.0f} MB of weights and Adam state",
        rows=(
            timed_row("save / raw write of the same bytes", ours, seconds["raw"], target=1.15),
            timed_row("save / raw direct write", ours, seconds["raw direct"]),
            timed_row("save / torch.save", ours, seconds["torch.save"]),
            timed_row("save / safetensors", ours, seconds["safetensors"]),
            *rows,
            *more,
        ),
        remarks=(
            "All write and fsync. Only ours also proves what it wrote: a checksum of every record and of the "
            "directory, every value looked at for NaN, the structure read back, an atomic rename.",
            "Memory is what no file backs (RssAnon and RssShmem), the windows that all ranks share included: "
            "pages of the mapped file are the kernel's to take back.",
        ),
        data=data | of_ranks | {variant: summary(values) for variant, values in seconds.items()},
    )
