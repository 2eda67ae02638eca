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
import re
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script_parser import OneLineParser, run_script

from run_errors import RunError

if TYPE_CHECKING:
    import torch
    from model_sources import ModelSource

    from tp_costs import SplitCost
    from tp_simulate import Comparison, Measured

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

    from tp_shard import shard_tensor_parallel
    from tp_simulate import measure

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        model = shard_tensor_parallel(source.build(dtype, seed), sequence_parallel=sequence)
        torch.save(vars(measure(model, ids)), Path(folder) / f"{name}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure_processes(
    source: ModelSource, ids: torch.Tensor, size: int, seed: int, *, sequence_parallel: bool
) -> dict[str, list[Measured]]:
    """What each of ``size`` gloo processes measures, by precision."""
    import torch
    from torch import multiprocessing

    from tp_simulate import Measured

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
# What is printed


def print_comparison(title: str, results: dict[str, Comparison]) -> None:
    """The table of outputs, loss and gradients; a row for each kind of parameter, its worst layer."""
    print(f"\n{title}")
    print(f"  {'':38}" + "".join(f"{name + ' max diff':>15}{'relative':>12}" for name in results))
    rows: dict[str, list[tuple[float, float]]] = {}
    for comparison in results.values():
        kinds: dict[str, tuple[float, float]] = {}
        for one in (comparison.logits, comparison.loss, *comparison.gradients):
            kind = re.sub(r"\.\d+\.", ".*.", one.name)
            kind = "outputs (logits)" if kind == "logits" else kind
            before = kinds.get(kind, (0.0, 0.0))
            kinds[kind] = (max(before[0], one.maximum), max(before[1], one.relative))
        for kind, values in kinds.items():
            rows.setdefault(kind, []).append(values)
    for kind, columns in rows.items():
        label = kind if kind in ("outputs (logits)", "loss") else f"d {kind}"
        print(f"  {label:38}" + "".join(f"{most:15.2e}{relative:12.2e}" for most, relative in columns))


def describe_traffic(traffic: dict[str, tuple[int, int]]) -> str:
    """``9 all-reduce (0.25 MB), ...``."""
    parts = [
        f"{count} {kind.replace('_', '-')} ({size:,} bytes)"
        for kind, (count, size) in sorted(traffic.items())
    ]
    return ", ".join(parts) or "none"


def print_collectives(measured: Measured, expected: SplitCost, unit: int) -> bool:
    """Counted against the formula, ``unit`` being the bytes of one activation; whether they are the same."""
    print("\nCollectives of one rank, counted in fp32 (and by formula)")
    same = True
    for label, counted, formula in (
        ("forward", measured.forward, expected.forward),
        ("step", measured.step, expected.step),
    ):
        equal = counted == formula
        same = same and equal
        verdict = "as by formula" if equal else f"BY FORMULA {describe_traffic(formula)}"
        print(f"  {label:8} {describe_traffic(counted)}: {verdict}")
    print(f"  each entrance and exit of a block carries {unit:,} bytes")
    return same


def print_weights(slice_map: Any, size: int) -> None:
    """How many weights each rank holds and how many of them are copies or padding."""
    import math

    total = slice_map.numel()
    print(f"\nWeights: {total:,} in all, {total / size:,.0f} by {size} ranks evenly")
    for rank in range(size):
        held = sum(math.prod(slice_map.local_shape(name, rank)) for name in slice_map.names)
        owned = sum(box.numel for name in slice_map.names for box in slice_map.owned(name, rank))
        print(f"  rank {rank} holds {held:,}, {owned:,} of them its own, the rest copies and padding")


def print_splits(title: str, splits: Sequence[SplitCost]) -> None:
    """The ways to put the same model on the same ranks."""
    from tp_costs import calls, payload

    print(f"\n{title}")
    head = f"{'weights/rank':>14}{'states':>10}{'forward':>9}{'step':>6}{'payload/step':>14}{'sent/rank':>11}"
    print(f"  {'':27}{head}")
    for split in splits:
        print(
            f"  {split.name:27}{split.parameters_per_rank:>14,}{_size(split.state_bytes):>10}"
            f"{calls(split.forward):>9}{calls(split.step):>6}{_size(payload(split.step)):>14}"
            f"{_size(split.sent_bytes):>11}"
        )
    print("  collectives (or sends) of the forward pass and of the step; what they wait for, and the source:")
    for split in splits:
        remark = f" ({split.remark})" if split.remark else ""
        words = f"{split.waits}{remark}; {split.source}"
        lines = textwrap.wrap(words, 70)
        print(f"  {split.name:27}{lines[0]}", *lines[1:], sep=f"\n{'':29}")


def _size(count: int) -> str:
    from tp_costs import readable_bytes

    return readable_bytes(count)


# ---------------------------------------------------------------------------------------------------
# The run


def choose(options: argparse.Namespace) -> tuple[ModelSource, ModelSource]:
    """The model that is checked and the one that was asked for; refuses what memory cannot hold."""
    from model_sources import (
        available_memory,
        check_heads,
        check_sequence,
        choose_source,
        narrowed,
        parameter_count,
    )

    from run_errors import DeviceError

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
            f"checking {source.label} in float64 takes about {_size(needed)} of memory and "
            f"{_size(available)} is available: give --layers to keep the first layers only, or leave "
            "--full-size out"
        )
    return source, asked


def verify(options: argparse.Namespace) -> list[str]:
    """Print everything; return what does not agree."""
    import torch

    from tp_costs import ModelOutline, all_splits, tensor_parallel
    from tp_simulate import compare_ranks, measure, measure_simulated

    size = options.tensor_parallel_size
    source, asked = choose(options)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))  # the ranks are threads too
    empty = source.build_empty()
    vocab_size = ModelOutline.of(empty).vocab_size
    ids = torch.randint(
        0,
        vocab_size,
        (options.batch_size, options.seq_len),
        generator=torch.Generator().manual_seed(options.seed),
    )
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    batch = (options.batch_size, options.seq_len)
    mode = ", sequence parallel" if options.sequence_parallel else ""
    print(f"{source.label} over {size} ranks{mode}, simulated in one process")
    print(f"  {source.describe()}; {parameters:,} parameters")
    weights = "weights of the checkpoint" if source.checkpoint else f"random weights (seed {options.seed})"
    print(f"  {weights}, batch of {options.batch_size} x {options.seq_len} tokens")

    problems: list[str] = []
    simulated: dict[str, Comparison] = {}
    ranks: dict[str, list[Measured]] = {}
    references: dict[str, Measured] = {}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        model = source.build(dtype, options.seed)
        ranks[name], slice_map = measure_simulated(
            model, ids, size, sequence_parallel=options.sequence_parallel
        )
        references[name] = measure(model, ids)
        simulated[name] = compare_ranks(references[name], ranks[name], slice_map)
    print_comparison("Simulated ranks against the unsharded model", simulated)
    problems += differences(simulated, "simulated ranks")

    expected = tensor_parallel(
        ModelOutline.of(empty), empty, size, batch, 4, sequence_parallel=options.sequence_parallel
    )
    positions = -(-batch[1] // size) * size if options.sequence_parallel else batch[1]
    unit = batch[0] * positions * ModelOutline.of(empty).hidden_size * 4
    if not print_collectives(ranks["fp32"][0], expected, unit):
        problems.append("the collectives counted are not those of the formula")
    print_weights(slice_map, size)

    if options.processes:
        over_gloo = measure_processes(
            source, ids, size, options.seed, sequence_parallel=options.sequence_parallel
        )
        real = {name: compare_ranks(references[name], over_gloo[name], slice_map) for name in over_gloo}
        print_comparison(f"{size} processes over gloo against the unsharded model", real)
        problems += differences(real, f"{size} processes")
        problems += compare_both(ranks, over_gloo)

    shape = f"{options.batch_size} x {options.seq_len} tokens"
    print_splits(
        f"The same model on {size} ranks, {shape}, 16-bit activations (states: 16 bytes a parameter)",
        all_splits(empty, size, batch, 2),
    )
    if asked is not source:
        print_full_model(asked, size)
    largest = max(
        one.maximum
        for one in (simulated["fp32"].logits, simulated["fp32"].loss, *simulated["fp32"].gradients)
    )
    if not problems:
        print("\nModels are mathematically equivalent")
        print(f"Max difference: {largest:.2e}")
        print("(the largest of any output, loss or gradient element in fp32; fp64 shows that it is rounding)")
    else:
        print("\nModels are NOT equivalent")
        print(f"Max difference: {largest:.2e}")
    return problems


def print_full_model(asked: ModelSource, size: int) -> None:
    """The table of splits for the model that was made narrow, at the size it trains at."""
    from dataclasses import replace

    from model_sources import REFERENCE_VOCAB_SIZE

    from tp_costs import all_splits

    settings = dict(asked.settings)
    if settings["vocab_size"] < REFERENCE_VOCAB_SIZE and asked.label != "config.json":
        settings["vocab_size"] = REFERENCE_VOCAB_SIZE
    full = replace(asked, settings=settings)
    tokens = (4, settings["max_position_embeddings"])
    print_splits(
        f"{full.label} in full ({settings['vocab_size']:,} ids) on {size} ranks, {tokens[0]} x {tokens[1]} "
        "tokens, 16-bit activations",
        all_splits(full.build_empty(), size, tokens, 2),
    )


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
    from tp_verify import difference

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

    def work() -> str | None:
        problems = "; ".join(verify(options))
        return f"the split model is not the unsharded model: {problems}" if problems else None

    return run_script(work, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
