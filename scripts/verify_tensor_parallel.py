"""Show that a model split over N ranks is the same model, in one process and without a GPU.

    python scripts/verify_tensor_parallel.py                            # argonne-tiny over 2 ranks
    python scripts/verify_tensor_parallel.py -N 8 --model argonne-2.0   # its head layout, made narrow
    python scripts/verify_tensor_parallel.py -N 4 --model gpt2          # the nanoGPT shape
    python scripts/verify_tensor_parallel.py --checkpoint-path FILE.pth --sequence-parallel --processes

The ranks are threads that use the slices, layers and collectives of training; each all-reduce is an explicit
sum. Outputs, loss and every gradient are compared with the unsharded model in float32 and float64, and the
collectives are counted. ``--processes`` does it again with N processes over gloo. Exit code 0: equivalent;
1: not; 2: a wrong flag.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.errors import DeviceError, RunError
from argonne.run.processes import leave
from argonne.tools.script import OneLineParser, run_script

if TYPE_CHECKING:
    import torch

    from argonne.tools.model_sources import ModelSource
    from argonne.verification.simulate import Comparison, Measured

TOLERANCES = {"fp32": 1e-4, "fp64": 1e-10}
"""Largest relative difference; a fault of a split shows as 1e-1 and more."""
_COPIES_IN_MEMORY = 5
"""The model and its gradients, the slices and theirs, and one copy while slices are cut."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser("Compare a model split over N simulated ranks with the unsharded model.")
    add = parser.add_argument
    add(
        "--model",
        "--model-config",
        metavar="NAME",
        help="an Argonne preset, a config.json, or a tiny random llama, mistral, qwen2, qwen3 or gpt2 of "
        "transformers (argonne-tiny)",
    )
    add("--checkpoint-path", metavar="FILE", help="take shape and weights from a checkpoint")
    add("-N", "--tensor-parallel-size", type=int, default=2, metavar="N", help="ranks, 2 to 8 (2)")
    add("--sequence-parallel", action="store_true", help="residual stream and norms on sequence slices")
    add("--processes", action="store_true", help="also run N processes over gloo, and compare")
    add("--batch-size", type=int, default=2, help="sequences (2)")
    add("--seq-len", type=int, default=33, help="tokens in a sequence (33, which no degree here divides)")
    add("--layers", type=int, metavar="K", help="keep the first K layers")
    add("--vocab-size", type=int, help="vocabulary of a random model (a preset: 1003)")
    add("--max-parameters", type=int, default=30_000_000, metavar="P",
        help="a random model with more is checked at a smaller width (30 million)")  # fmt: skip
    add("--full-size", action="store_true", help="do not make a large model narrow")
    add("--seed", type=int, default=0)
    add("--debug", action="store_true", help="tracebacks")
    options = parser.parse_args(arguments)
    if not 2 <= options.tensor_parallel_size <= 8:
        parser.error(f"-N {options.tensor_parallel_size}: give 2 to 8 ranks")
    for flag in ("batch_size", "layers", "max_parameters", "vocab_size"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} {value}: give at least 1")
    if options.seq_len < 2:
        parser.error(f"--seq-len {options.seq_len}: the loss needs at least 2 tokens")
    return options


# ---------------------------------------------------------------------------------------------------
# Ranks that are processes


def _rank_main(
    rank: int, size: int, folder: str, source: ModelSource, seed: int, ids: torch.Tensor, sequence: bool
) -> None:
    """One gloo rank: measure in both precisions and leave the numbers in ``folder``."""
    import torch
    import torch.distributed as dist

    from argonne.verification.simulate import measure
    from tp_shard import shard_tensor_parallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        model = shard_tensor_parallel(source.build(dtype, seed), sequence_parallel=sequence)
        torch.save(vars(measure(model, ids)), Path(folder) / f"{name}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def measure_processes(
    source: ModelSource, ids: torch.Tensor, size: int, seed: int, *, sequence_parallel: bool
) -> dict[str, list[Measured]]:
    """What each of ``size`` gloo processes measures, by precision."""
    import torch
    from torch import multiprocessing

    from argonne.verification.simulate import Measured

    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, folder, source, seed, ids, sequence_parallel)
        try:
            multiprocessing.spawn(_rank_main, args=arguments, nprocs=size)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            raise RunError(f"--processes: rank {error.error_index} failed ({last}); try without") from error
        results: dict[str, list[Measured]] = {}
        for name in TOLERANCES:
            kept = [torch.load(Path(folder) / f"{name}_{rank}.pt", weights_only=True) for rank in range(size)]
            results[name] = [Measured(**one) for one in kept]
    return results


# ---------------------------------------------------------------------------------------------------
# The run


def choose(options: argparse.Namespace) -> tuple[ModelSource, ModelSource]:
    """The model that is checked and the one that was asked for; refuses what memory cannot hold."""
    from argonne.tools.model_sources import (
        available_memory,
        check_heads,
        check_sequence,
        choose_source,
        narrowed,
        parameter_count,
    )
    from argonne.tp.costs import readable_bytes

    asked = choose_source(
        options.model,
        options.checkpoint_path,
        tp_size=options.tensor_parallel_size,
        layers=options.layers,
        vocab_size=options.vocab_size,
    )
    source = asked
    check_heads(asked, options.tensor_parallel_size)
    check_sequence(asked, options.seq_len, sequence_parallel=options.sequence_parallel)
    size = parameter_count(asked)
    random_argonne = asked.family == "argonne" and asked.checkpoint is None
    if random_argonne and size > options.max_parameters and not options.full_size:
        source = narrowed(asked, options.max_parameters)
        print(
            f"{asked.label} has {size:,} parameters. Checked here is a narrow model of the same head layout"
        )
        print("(--full-size checks it whole); the last table is for the full model.\n")
    needed = parameter_count(source) * 8 * _COPIES_IN_MEMORY
    available = available_memory()
    if available is not None and needed > available:
        raise DeviceError(
            f"checking {source.label} in float64 takes about {readable_bytes(needed)} of memory and "
            f"{readable_bytes(available)} is available: give --layers to keep the first layers only, or "
            "leave --full-size out"
        )
    return source, asked


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was measured in this process, by precision: the unsharded model and each simulated rank of it."""

    references: dict[str, Measured]
    ranks: dict[str, list[Measured]]
    comparisons: dict[str, Comparison]
    slice_map: Any

    @property
    def largest(self) -> float:
        """The largest difference of any output, loss or gradient element in fp32."""
        fp32 = self.comparisons["fp32"]
        return max(one.maximum for one in (fp32.logits, fp32.loss, *fp32.gradients))


def verify(options: argparse.Namespace) -> list[str]:
    """Print everything; return what does not agree."""
    import torch

    from argonne.tools.verify_report import (
        print_comparison,
        print_full_model,
        print_heading,
        print_splits,
        print_verdict,
        print_weights,
    )
    from argonne.tp.strategies import all_splits

    size, batch = options.tensor_parallel_size, (options.batch_size, options.seq_len)
    source, asked = choose(options)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))  # the ranks are threads too
    model = source.build_empty()
    ids = draw_tokens(model, batch, options.seed)
    print_heading(source, model, batch, size, options.seed, sequence_parallel=options.sequence_parallel)

    simulation = simulate_ranks(source, ids, options)
    print_comparison("Simulated ranks against the unsharded model", simulation.comparisons)
    problems = differences(simulation.comparisons, "simulated ranks")
    problems += check_collectives(model, simulation.ranks["fp32"][0], options)
    print_weights(simulation.slice_map, size)
    if options.processes:
        problems += check_processes(source, ids, simulation, options)
    print_splits(
        f"The same model on {size} ranks, {batch[0]} x {batch[1]} tokens, 16-bit activations "
        "(states: 16 bytes a parameter)",
        all_splits(model, size, batch, 2),
    )
    if asked is not source:
        print_full_model(asked, size)
    print_verdict(problems, simulation.largest)
    return problems


def draw_tokens(model: Any, batch: tuple[int, int], seed: int) -> torch.Tensor:
    """Random ids (batch, seq_len) of the model's vocabulary."""
    import torch

    from argonne.tp.costs import ModelOutline

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ModelOutline.of(model).vocab_size, batch, generator=generator)


def simulate_ranks(source: ModelSource, ids: torch.Tensor, options: argparse.Namespace) -> Simulation:
    """Measure the unsharded model and its simulated ranks in both precisions, and compare them."""
    import torch

    from argonne.verification.simulate import compare_ranks, measure, measure_simulated

    references: dict[str, Measured] = {}
    ranks: dict[str, list[Measured]] = {}
    comparisons: dict[str, Comparison] = {}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        model = source.build(dtype, options.seed)
        ranks[name], slice_map = measure_simulated(
            model, ids, options.tensor_parallel_size, sequence_parallel=options.sequence_parallel
        )
        references[name] = measure(model, ids)
        comparisons[name] = compare_ranks(references[name], ranks[name], slice_map)
    return Simulation(references=references, ranks=ranks, comparisons=comparisons, slice_map=slice_map)


def check_collectives(model: Any, measured: Measured, options: argparse.Namespace) -> list[str]:
    """Print one rank's collectives in fp32 beside the formula's; what does not agree."""
    from argonne.tools.verify_report import print_collectives
    from argonne.tp.costs import ModelOutline, tensor_parallel

    outline, size = ModelOutline.of(model), options.tensor_parallel_size
    batch, seq_len = options.batch_size, options.seq_len
    expected = tensor_parallel(
        outline, model, size, (batch, seq_len), 4, sequence_parallel=options.sequence_parallel
    )
    positions = -(-seq_len // size) * size if options.sequence_parallel else seq_len
    if print_collectives(measured, expected, batch * positions * outline.hidden_size * 4):
        return []
    return ["the collectives counted are not those of the formula"]


def check_processes(
    source: ModelSource, ids: torch.Tensor, simulation: Simulation, options: argparse.Namespace
) -> list[str]:
    """Measure again with a process for each rank; what does not agree, with either."""
    from argonne.tools.verify_report import print_comparison
    from argonne.verification.simulate import compare_ranks

    size = options.tensor_parallel_size
    measured = measure_processes(source, ids, size, options.seed, sequence_parallel=options.sequence_parallel)
    comparisons = {
        name: compare_ranks(simulation.references[name], measured[name], simulation.slice_map)
        for name in measured
    }
    print_comparison(f"{size} processes over gloo against the unsharded model", comparisons)
    problems = differences(comparisons, f"{size} processes")
    return problems + compare_both(simulation.ranks, measured)


def differences(results: dict[str, Comparison], who: str) -> list[str]:
    """What is beyond tolerance, in words."""
    problems = []
    for name, comparison in results.items():
        if comparison.unequal_copies:
            problems.append(f"{who}, {name}: copies of {comparison.unequal_copies[0]} have unequal gradients")
        worst = max((comparison.logits, comparison.loss, *comparison.gradients), key=lambda one: one.relative)
        if not worst.relative <= TOLERANCES[name]:
            problems.append(
                f"{who}, {name}: {worst.name} is off by {worst.relative:.2e} "
                f"(tolerance {TOLERANCES[name]:.0e})"
            )
    return problems


def compare_both(simulated: dict[str, list[Measured]], real: dict[str, list[Measured]]) -> list[str]:
    """Each simulated rank against the process of the same rank."""
    from argonne.verification.compare import difference

    problems = []
    print("\nSimulated ranks against processes, gradient by gradient and rank by rank")
    for name, tolerance in TOLERANCES.items():
        compared = [
            difference(f"rank {rank} {key}", here.gradients[key], there.gradients[key], whole=_norm(here))
            for rank, (here, there) in enumerate(zip(simulated[name], real[name], strict=True))
            for key in here.gradients
        ]
        worst = max(compared, key=lambda one: one.relative)
        counts = all(
            (here.forward, here.step) == (there.forward, there.step)
            for here, there in zip(simulated[name], real[name], strict=True)
        )
        print(
            f"  {name}: max diff {max(one.maximum for one in compared):.2e}, relative {worst.relative:.2e}; ",
            end="",
        )
        print("same collectives" if counts else "DIFFERENT collectives")
        if not worst.relative <= tolerance or not counts:
            problems.append(f"simulated ranks and processes do not agree in {name} ({worst.name})")
    return problems


def _norm(measured: Measured) -> float:
    import torch

    return torch.nn.utils.get_total_norm(measured.gradients.values()).item()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Some of its models warn of defaults that a caller cannot set; the processes inherit this.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def work() -> str | None:
        problems = "; ".join(verify(options))
        return f"the split model is not the unsharded model: {problems}" if problems else None

    return run_script(work, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
