"""What a run of so many steps will read: of one corpus, or of each source of a mixture."""

from __future__ import annotations

import argparse
from copy import copy

from argonne.config.mixture import MixedSource
from argonne.tools.corpus_overview import show_corpus


def show_data(options: argparse.Namespace) -> None:
    """Print each source, and with --total-steps the samples, tokens and epochs that the run reads of it."""
    sources: list[MixedSource] = options.data_mix or [MixedSource("", "1", "")]
    tokens = {}
    for source in sources:
        if source.name:
            print(f"source {source.name}: {source.glob}")
        own = copy(options)
        if source.name:
            own.data_glob = source.glob
        tokens[source.name] = show_corpus(own)
        if source.name:
            print()
    if options.data_mix or options.total_steps is not None:
        print("\n".join(reading_lines(sources, tokens, options)))


def samples_a_step(options: argparse.Namespace) -> int:
    """G: sequences of one optimizer step."""
    replicas = options.batch_size * options.gradient_accumulation_steps * options.data_parallel_size
    return int(options.global_batch_size or replicas)


def reading_lines(
    sources: list[MixedSource], tokens: dict[str, float | None], options: argparse.Namespace
) -> list[str]:
    """A table; ``tokens``: about how many each source has, None where that is not known."""
    from argonne.data.mixture import shares

    steps, share_of = options.total_steps or 0, shares({source.name: source.weight for source in sources})
    samples = steps * samples_a_step(options)
    lines = []
    if steps:
        lines.append(f"{steps:,} steps read {samples:,} samples, {samples * options.block_size:,} tokens")
    lines.append(f"{'source':16} {'share':>8} {'samples':>14} {'tokens':>18} {'epochs (about)':>15}")
    for name, share in share_of.items():
        own = round(samples * share)
        row = f"{name or '(all)':16} {float(share):8.2%}"
        if steps:
            row += f" {own:14,} {own * options.block_size:18,} {_epochs(own, tokens[name], options):>15}"
        lines.append(row)
    return lines if steps else [*lines, "give --total-steps for samples, tokens and epochs of each"]


def _epochs(samples: int, tokens: float | None, options: argparse.Namespace) -> str:
    if not tokens:
        return "?"
    trained_on = tokens if options.holdout is None else tokens * (1 - 1 / options.holdout)
    return f"{samples * options.block_size / trained_on:.2f}"
