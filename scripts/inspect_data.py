#!/usr/bin/env python3
"""Look at the data: the shards of a corpus, and the text that a training step sees.

    scripts/inspect_data.py --data-glob 'data/*.parquet'
    scripts/inspect_data.py --data-mix web=.7:'web/*' code=.3:'code/*' --tokenizer-path T --total-steps 9000
    scripts/inspect_data.py --data-glob 'data/*.parquet' --tokenizer-path T --step 1234 --global-batch-size 32
    scripts/inspect_data.py --data-glob 'data/*.parquet' --tokenizer-path T --at 000_00042.parquet:1234:56

A step is counted from 0, as the samples are: step s takes the samples s*G ... s*G+G-1, and the metrics call
it s + 1, the number of steps completed with it. A step far from the start is found by tokenizing what lies
before it; --metrics finds any step that a run has done at once, --checkpoint-path begins at a checkpoint's
step, --at anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.mixture import MIX_FORM, mixed_source, mixture_problems
from argonne.config.options import DataOptions, TrainingOptions
from argonne.errors import ConfigError
from argonne.tools.mixture_overview import show_data
from argonne.tools.script import OneLineParser, Repeated, run_script
from argonne.tools.step_text import show_step

AT_LEAST = {
    "step": 0,
    "characters": 0,
    "samples": 1,
    "block_size": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "data_parallel_size": 1,
    "global_batch_size": 1,
    "num_proc": 1,
    "total_steps": 1,
    "holdout": 2,
}


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--data-glob",
        action=Repeated,
        default=DataOptions.data_glob,
        help=f"the shards; may be repeated ({' '.join(DataOptions.data_glob)})",
    )
    parser.add_argument(
        "--data-mix", nargs="+", action="extend", metavar=MIX_FORM, help="the sources of a mixture, instead"
    )
    parser.add_argument("--shuffle", action="store_true", help="rows in the order of a run with --shuffle")
    parser.add_argument("--holdout", type=int, metavar="N", help="the --holdout of the run")
    parser.add_argument(
        "--total-steps", type=int, help="say what a run of so many steps reads of each source"
    )
    parser.add_argument("--tokenizer-path", help="needed for token estimates and for a step's text")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")
    parser.add_argument("--text-column", help="column of the text (text)")
    parser.add_argument("--token-column", help="list column of token ids, instead of text")
    parser.add_argument("--step", type=int, help="print the text of this optimizer step, counted from 0")
    parser.add_argument("--at", metavar="FILE:ROW[:TOKEN]", help="print the samples from this position on")
    parser.add_argument(
        "--checkpoint-path", type=Path, help="begin where this checkpoint stands (of a folder, its newest)"
    )
    parser.add_argument("--metrics", type=Path, help="training_metrics.jsonl of the run that did the --step")
    parser.add_argument("--samples", type=int, help="print at most so many samples of the step")
    parser.add_argument(
        "--characters", type=int, default=2000, help="of each sample at most; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--block-size", type=int, default=TrainingOptions.block_size, help="tokens per sequence (%(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=TrainingOptions.batch_size,
        help="sequences per replica and micro-batch (%(default)s)",
    )
    parser.add_argument(
        "--gradient-accumulation-steps", type=int, default=1, help="micro-batches a step (%(default)s)"
    )
    parser.add_argument(
        "--data-parallel-size", type=int, default=1, help="model replicas of the run (%(default)s)"
    )
    parser.add_argument("--global-batch-size", type=int, help="sequences a step; instead of the three above")
    add_run_flags(parser)
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the run whose steps are looked at."""
    parser.add_argument(
        "--exclude-documents", metavar="FILE", help="the run's list (a checkpoint has its own)"
    )
    parser.add_argument("--no-packing", action="store_true", help="each document cut alone, as in such a run")
    parser.add_argument("--no-streaming", action="store_true", help="the shuffled order; needs --cache-dir")
    parser.add_argument(
        "--seed", type=int, default=TrainingOptions.seed, help="of the shuffled order (%(default)s)"
    )
    parser.add_argument("--cache-dir", type=Path, help="the run's cache folder")
    parser.add_argument(
        "--num-proc", type=int, default=DataOptions.num_proc, help="tokenizing workers (%(default)s)"
    )
    parser.add_argument("--skip-bad-shards", action="store_true", help="pass over data that cannot be read")
    parser.add_argument(
        "--allow-data-change", action="store_true", help="look even if the data is not the checkpoint's"
    )
    parser.add_argument("--all", action="store_true", help="list every shard")


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)

    def work() -> None:
        check_options(options)
        if options.step is None and options.at is None and options.checkpoint_path is None:
            show_data(options)
            return
        if options.checkpoint_path is not None:
            from inspect_checkpoint import newest_in

            options.checkpoint_path = newest_in(options.checkpoint_path)
        show_step(options)

    return run_script(work)


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together or are too small."""
    if options.data_mix is not None:
        parse_mix(options)
    if options.shuffle and options.no_streaming:
        raise ConfigError("--shuffle contradicts --no-streaming, which has its own order: leave one out")
    wants_text = options.step is not None or options.at is not None or options.checkpoint_path is not None
    if wants_text and options.tokenizer_path is None:
        raise ConfigError("the text of a step needs --tokenizer-path: give the run's tokenizer")
    if options.at is not None and (options.step is not None or options.checkpoint_path is not None):
        raise ConfigError("--at excludes --step and --checkpoint-path: give one of them")
    if options.at is not None and options.data_mix is not None:
        raise ConfigError("--at names a place in one source: give its --data-glob instead of --data-mix")
    both = options.token_column is not None and options.text_column is not None
    if both and options.data_mix is None:
        raise ConfigError("--token-column contradicts --text-column: leave one out")
    if options.metrics is not None and (options.step is None or options.checkpoint_path is not None):
        raise ConfigError("--metrics goes with --step and without --checkpoint-path")
    if options.at is not None and options.no_streaming:
        raise ConfigError("--at names a place in the shards, which --no-streaming shuffles: give --step")
    for flag, least in AT_LEAST.items():
        value = getattr(options, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag.replace('_', '-')} {value} must be at least {least}")


def parse_mix(options: argparse.Namespace) -> None:
    """--data-mix as sources; raises ConfigError."""
    try:
        options.data_mix = [mixed_source(text) for text in options.data_mix]
    except ValueError as error:
        raise ConfigError(f"--data-mix {error}: give {MIX_FORM}") from error
    given = {"data_mix": options.data_mix}
    if problems := mixture_problems(given):
        raise ConfigError("; ".join(problems))


if __name__ == "__main__":
    sys.exit(main())
