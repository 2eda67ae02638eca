"""What saving and loading a checkpoint of a few GB costs: anonymous memory of each rank, and time.

    python -m tests.checkpoint.costs FOLDER [ROUNDS]

saves and loads 2.7 GB on 1, 2 and 4 ranks, prints a line for each, then the time of ROUNDS saves beside that
of writing the same bytes raw with fsync. The file is removed at the end.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import argonne.testing.checkpoint_samples as samples
from argonne.benchmarks.memory_probe import PeakMemory
from argonne.checkpoint.save import save_checkpoint
from argonne.config.families import read_folder_config
from argonne.run.processes import leave
from argonne.tp.slices import SliceMap
from checkpointing import InitialWeights, load_slices, open_chosen, open_weights

LARGE = {
    "HIDDEN": 1024,
    "HEADS": 8,
    "KEY_VALUE_HEADS": 4,
    "HEAD_DIM": 128,
    "INTERMEDIATE": 2816,
    "VOCABULARY": 32003,
    "LAYERS": 16,
}
"""221 million parameters: 2.66 GB with Adam state."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes and seconds of one rank."""

    slices: int
    """Weights and Adam state that the rank holds."""
    loaded: int
    """Peak of anonymous memory while loading, above the bare process."""
    saving: int
    """Peak while saving, above what the rank held before."""
    save_seconds: float


def value_of(name: str, key: str) -> float:
    return 0.25 + zlib.crc32(f"{name} {key}".encode()) % 1000 / 1000


def save(rank: int, tp_size: int, folder: Path, state: tuple[Any, Any]) -> float:
    """Save and return the seconds that it took."""
    started = time.monotonic()
    save_checkpoint(
        folder / "tensor_parallel_checkpoint_step_7.pth",
        slice_map=samples.sample_map(tp_size),
        rank=rank,
        parameters=state[0],
        adam=state[1],
        param_group=samples.PARAM_GROUP,
        metadata=samples.sample_metadata(),
        tied=True,
        control_group=None,
    )
    return time.monotonic() - started


def filled(rank: int, tp_size: int) -> tuple[Any, Any]:
    """This rank's weights and Adam state, each tensor of one value."""
    slice_map = samples.sample_map(tp_size)
    parameters, adam = samples.empty_slices(slice_map, rank)
    for name in slice_map.names:
        for box in slice_map.rectangles(name, rank):
            parameters[name][box.local_index] = value_of(name, "param")
            for key in ("exp_avg", "exp_avg_sq"):
                adam[name][key][box.local_index] = value_of(name, key)
        adam[name]["step"].fill_(7)
    return parameters, adam


def _joined(rank: int, tp_size: int, folder: str) -> SliceMap:
    """The slices of the large samples, once all ranks are there to measure at the same time."""
    vars(samples).update(LARGE)
    torch.set_num_threads(1)
    if tp_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=tp_size)
        dist.barrier()
    return samples.sample_map(tp_size)


def _leave(tp_size: int) -> None:
    """End this rank once all are done."""
    if tp_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    leave(0)


def one_rank(rank: int, tp_size: int, folder: str, told: Any) -> None:
    """Load into empty slices, compare, save again; put the Cost into ``told``."""
    slice_map = _joined(rank, tp_size, folder)
    with PeakMemory() as loading:
        parameters, adam = samples.empty_slices(slice_map, rank)
        view, _, _ = open_chosen(
            folder, Path(folder), force_from_scratch=False, rank=rank, control_group=None
        )
        assert view is not None
        report = load_slices(
            view, slice_map=slice_map, rank=rank, parameters=parameters, adam=adam, control_group=None
        )
    assert report.optimizer_restored
    for name in slice_map.names:
        for box in slice_map.rectangles(name, rank):
            assert bool((parameters[name][box.local_index] == value_of(name, "param")).all()), name
    slices = sum(4 * p.numel() * 3 for p in parameters.values())
    if tp_size > 1:
        dist.barrier()
    with PeakMemory() as saving:
        seconds = save(rank, tp_size, Path(folder), (parameters, adam))
    told.put(
        (
            rank,
            Cost(slices=slices, loaded=loading.extra, saving=saving.extra, save_seconds=seconds),
        )
    )
    _leave(tp_size)


def one_rank_from_weights(rank: int, tp_size: int, folder: str, told: Any) -> None:
    """Load from the bfloat16 folder that `make_weights` wrote; put the Cost into ``told``."""
    slice_map = _joined(rank, tp_size, folder)
    initial = InitialWeights(path=folder, folder_config=read_folder_config)
    with PeakMemory() as loading:
        parameters = {name: torch.zeros(slice_map.local_shape(name, rank)) for name in slice_map.names}
        view, _ = open_weights(initial, rank=rank, control_group=None)
        load_slices(view, slice_map=slice_map, rank=rank, parameters=parameters, adam={}, control_group=None)
    assert view.weights_only and view.blind_ranks == ()
    for name in slice_map.names:
        value = float(torch.tensor(value_of(name, "param"), dtype=torch.bfloat16))
        for box in slice_map.rectangles(name, rank):
            assert bool((parameters[name][box.local_index] == value).all()), name
    slices = sum(4 * p.numel() for p in parameters.values())
    told.put((rank, Cost(slices=slices, loaded=loading.extra, saving=0, save_seconds=0.0)))
    _leave(tp_size)


def make_weights(folder: Path) -> int:
    """Write a folder of bfloat16 weights in two files with an index; return their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vars(samples).update(LARGE)
    shapes = list(samples.sample_shapes(tied=True).items())
    placed = {}
    for index, part in enumerate((shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :])):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        weights = {n: torch.full(s, value_of(n, "param"), dtype=torch.bfloat16) for n, s in part}
        save_file(weights, folder / file)
        placed.update(dict.fromkeys(weights, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    config = {key.lower(): value for key, value in LARGE.items()}
    names = {
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "key_value_heads": "num_key_value_heads",
    }
    names |= {"intermediate": "intermediate_size", "vocabulary": "vocab_size", "layers": "num_hidden_layers"}
    document = {names.get(key, key): value for key, value in config.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "argonne2", **document}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(tp_size: int, folder: Path, rank_main: Callable[..., None] = one_rank) -> list[Cost]:
    """The costs of every rank; ``folder`` holds a checkpoint, or weights, already."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    (folder / "store").unlink(missing_ok=True)
    ranks = [
        context.Process(target=rank_main, args=(rank, tp_size, str(folder), told)) for rank in range(tp_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"a rank ended with {process.exitcode}")
    costs = dict(told.get() for _ in ranks)
    return [costs[rank] for rank in range(tp_size)]


def largest_tensor() -> int:
    return 4 * LARGE["VOCABULARY"] * LARGE["HIDDEN"]


def make(folder: Path) -> int:
    """Write the checkpoint; return its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vars(samples).update(LARGE)
    save(0, 1, folder, filled(0, 1))
    return (folder / "tensor_parallel_checkpoint_step_7.pth").stat().st_size


def raw_write(path: Path, size: int) -> float:
    """Seconds to write ``size`` bytes and fsync them."""
    piece = bytes(16 << 20)
    started = time.monotonic()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    left = size
    while left:
        left -= os.write(descriptor, piece[: min(left, len(piece))])
    os.fsync(descriptor)
    os.close(descriptor)
    return time.monotonic() - started


def compare_times(folder: Path, rounds: int) -> list[tuple[float, float]]:
    """(seconds of a save, of a raw write of as many bytes), in turns."""
    size = make(folder)
    state = filled(0, 1)
    pairs = []
    for _ in range(rounds):
        (folder / "tensor_parallel_checkpoint_step_7.pth").unlink()
        saved = save(0, 1, folder, state)
        raw = raw_write(folder / "raw", size)
        (folder / "raw").unlink()
        pairs.append((saved, raw))
    return pairs


def spread(values: list[float], text: Callable[[float], str]) -> str:
    return f"median {text(statistics.median(values))} ({text(min(values))} to {text(max(values))})"


def main(folder: Path, rounds: int) -> None:
    try:
        size = make(folder)
        print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest_tensor() / 1e6:.0f} MB")
        for tp_size in (1, 2, 4):
            for rank, cost in enumerate(measure(tp_size, folder)):
                print(
                    f"{tp_size} ranks, rank {rank}: slices {cost.slices / 1e6:.0f} MB, loading "
                    f"{cost.loaded / 1e6:.0f} MB ({cost.loaded / cost.slices:.3f} x), saving "
                    f"+{cost.saving / 1e6:.0f} MB ({cost.saving / largest_tensor():.2f} of the largest "
                    f"tensor), {cost.save_seconds:.1f} s",
                    flush=True,
                )
        if rounds:
            pairs = compare_times(folder, rounds)
            print("save      ", spread([saved for saved, _ in pairs], "{:.2f} s".format))
            print("raw write ", spread([raw for _, raw in pairs], "{:.2f} s".format))
            print("ratio     ", spread([saved / raw for saved, raw in pairs], "{:.3f}".format))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
