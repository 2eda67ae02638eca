"""Tensor parallelism step by step, on N processes: a lesson that is computed while it is told.

    python scripts/tensor_parallel_practice.py                  # 2 processes on the CPU
    python scripts/tensor_parallel_practice.py --processes 4

The processes meet in a group (gloo on CPUs, NCCL on GPUs) and build, from the public layers of ``tp_shard``,
a column-parallel linear layer with gathered output, an MLP and an attention block. For each the lesson shows
what every rank holds, counts the collectives and compares outputs and gradients with the unsharded layer of
torch. The blocks are in practice_layers.py, what is said about them in practice_lesson.py.

Exit code 0: all agree; 1: something differs; 2: a wrong flag.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import ConfigError, DeviceError, RunError
from argonne.ranks.gpu_environment import set_gpu_environment
from argonne.run.processes import leave
from argonne.tools.script import OneLineParser, run_script, silence_stdout


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("Learn tensor parallelism: N processes, three layers, every step checked.")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="ranks: 2, 4 or 8 (2)")
    parser.add_argument(
        "--backend", choices=("gloo", "nccl"), help="(nccl where each rank can have a GPU, else gloo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (0)")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    return parser.parse_args(arguments)


def check_processes(count: int) -> None:
    """Raise ConfigError, saying why, where the lesson's layers cannot be split over ``count`` ranks."""
    from argonne.tools.practice_layers import KEY_VALUE_HEADS, QUERY_HEADS, degrees

    fitting = degrees()
    remedy = f"give {', '.join(map(str, fitting[:-1]))} or {fitting[-1]}"
    if count < 2:
        raise ConfigError(f"--processes {count}: a split needs at least 2 ranks; {remedy}")
    if count not in fitting:
        raise ConfigError(
            f"--processes {count} does not divide both the lesson's {QUERY_HEADS} query heads and "
            f"{KEY_VALUE_HEADS} key/value heads, and each rank needs whole ones; {remedy}"
        )


def choose_backend(asked: str | None, count: int) -> str:
    """The backend; raises DeviceError where there are not enough GPUs for NCCL."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if asked == "nccl" and gpus < count:
        raise DeviceError(
            f"--backend nccl needs a GPU for each of {count} processes, and {gpus} can be used: give "
            "--backend gloo, or fewer --processes"
        )
    return asked or ("nccl" if gpus >= count else "gloo")


def rank_main(rank: int, size: int, folder: str, backend: str, seed: int, found: Any) -> None:
    """One process of the lesson. Rank 0 prints for all, and leaves in ``found`` what differs."""
    import torch
    import torch.distributed as dist

    from argonne.tools.practice_lesson import teach
    from tp_shard import ProcessTPGroup

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    world = dist.group.WORLD
    assert world is not None
    about = dist.new_group(backend="gloo")  # carries what is printed; the lesson's own group is `world`

    def from_all(own: Any) -> list[Any]:
        every: list[Any] = [None] * size
        dist.all_gather_object(every, own, group=about)
        return every

    def say(line: str = "") -> None:
        if rank == 0:
            try:
                print(line, flush=True)
            except BrokenPipeError:  # the other ranks wait for this one: the lesson goes on, unheard
                silence_stdout()

    problems = teach(ProcessTPGroup(world), device, seed, from_all, say)
    if rank == 0:
        found.put(problems)
    dist.barrier(group=about)
    dist.destroy_process_group()
    leave(0)


def practise(options: argparse.Namespace) -> list[str]:
    """Start the processes and wait for the lesson to end; returns what differs."""
    check_processes(options.processes)
    backend = choose_backend(options.backend, options.processes)
    from torch import multiprocessing

    found = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.processes, folder, backend, options.seed, found)
        try:
            multiprocessing.spawn(rank_main, args=arguments, nprocs=options.processes)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            if options.debug:
                raise
            last = str(error).strip().splitlines()[-1]
            raise RunError(f"rank {error.error_index} failed ({last}): --debug shows where") from error
    problems: list[str] = found.get()
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    def work() -> str | None:
        set_gpu_environment(os.environ, one_queue=True)
        problems = "; ".join(practise(options))
        return f"the split layers are not the unsharded ones: {problems}" if problems else None

    return run_script(work, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
