#!/usr/bin/env python3
"""Look at the data: the shards of a corpus, and the text that a training step sees.

    scripts/inspect_data.py --data-glob 'data/*.parquet'
    scripts/inspect_data.py --data-glob 'data/*.parquet' --tokenizer-path T --step 1234 --global-batch-size 32
    scripts/inspect_data.py --data-glob 'data/*.parquet' --tokenizer-path T --at 000_00042.parquet:1234:56

A step is counted from 0, as the samples are: step s takes the samples s*G ... s*G+G-1, and the metrics call
it s + 1, the number of steps completed with it. A step far from the start is found by tokenizing what lies
before it; --metrics finds any step that a run has done at once, --checkpoint-path begins at a checkpoint's
step, --at anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.options import DataOptions, TrainingOptions
from argonne.errors import ConfigError, DataError
from argonne.tools.script import OneLineParser, run_script

if TYPE_CHECKING:
    from argonne.data.shards import Shard
    from argonne.data.source import SourceOptions
    from data_stream import OpenedStream

SAMPLED_SHARDS = 16
SAMPLED_ROWS = 32
SAMPLED_CHARACTERS = 100_000
LISTED_SHARDS = 20
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
}


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data-glob", default=DataOptions.data_glob, help="the shards (%(default)s)")
    parser.add_argument("--tokenizer-path", help="needed for token estimates and for a step's text")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")
    parser.add_argument("--text-column", help="column of the text (text)")
    parser.add_argument("--step", type=int, help="print the text of this optimizer step, counted from 0")
    parser.add_argument("--at", metavar="FILE:ROW[:TOKEN]", help="print the samples from this position on")
    parser.add_argument(
        "--checkpoint-path", type=Path, help="begin where this checkpoint stands (of a folder, its newest)"
    )
    parser.add_argument(
        "--metrics", type=Path, help="stats/training_metrics.jsonl of the run that did the --step"
    )
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)

    def work() -> None:
        check_options(options)
        if options.step is None and options.at is None and options.checkpoint_path is None:
            show_corpus(options)
        else:
            show_step(options)

    return run_script(work)


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together or are too small."""
    wants_text = options.step is not None or options.at is not None or options.checkpoint_path is not None
    if wants_text and options.tokenizer_path is None:
        raise ConfigError("the text of a step needs --tokenizer-path: give the run's tokenizer")
    if options.at is not None and (options.step is not None or options.checkpoint_path is not None):
        raise ConfigError("--at excludes --step and --checkpoint-path: give one of them")
    if options.metrics is not None and (options.step is None or options.checkpoint_path is not None):
        raise ConfigError("--metrics goes with --step and without --checkpoint-path")
    if options.at is not None and options.no_streaming:
        raise ConfigError("--at names a place in the shards, which --no-streaming shuffles: give --step")
    for flag, least in AT_LEAST.items():
        value = getattr(options, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag.replace('_', '-')} {value} must be at least {least}")


# ----------------------------------------------------------------------------------------------------------
# The corpus


def show_corpus(options: argparse.Namespace) -> None:
    """Print the shards, their sizes, and estimates of documents and tokens."""
    from argonne.data.shards import open_corpus

    shards = open_corpus(
        options.data_glob,
        options.text_column,
        skip_bad_shards=options.skip_bad_shards,
        cache_dir=options.cache_dir,
    )
    column = options.text_column or "text"
    text_bytes = [shard_text_bytes(shard, column) for shard in shards]
    share, tokens_per_byte = sample_corpus(shards, column, options)
    print(f"{'shard':32} {'rows':>12} {'row groups':>10} {'MiB':>9} {'text MiB':>9} {'tokens (about)':>16}")
    for index, shard in enumerate(shards):
        if not options.all and LISTED_SHARDS <= index < len(shards) - 1:
            if index == LISTED_SHARDS:
                print(f"... {len(shards) - LISTED_SHARDS - 1} more (--all lists them)")
            continue
        size = text_bytes[index]
        row = f"{shard.name:32} {shard.rows:12,} {len(shard.group_rows):10,} {shard.size / 2**20:9.1f}"
        print(f"{row} {size / 2**20:9.1f} {estimate(size, tokens_per_byte):>16}  {shard.fault}".rstrip())
    rows = sum(shard.rows for shard in shards)
    print(f"{len(shards):,} shards, {rows:,} rows, about {round(rows * share):,} documents (rows with text)")
    total = sum(text_bytes)
    print(f"text: {total / 2**20:,.1f} MiB, {estimate(total, tokens_per_byte)} tokens (estimated)")
    if tokens_per_byte is None:
        print("give --tokenizer-path for an estimate of the tokens")


def estimate(size: int, tokens_per_byte: float | None) -> str:
    return "?" if tokens_per_byte is None else f"{round(size * tokens_per_byte):,}"


def shard_text_bytes(shard: Shard, column: str) -> int:
    """Bytes of text in a shard, from its footer; 0 for one that cannot be used."""
    from argonne.data.formats import open_shard

    if shard.fault:
        return 0
    with open_shard(shard.path, column) as reader:
        return reader.text_bytes()


def sample_corpus(
    shards: Sequence[Shard], column: str, options: argparse.Namespace
) -> tuple[float, float | None]:
    """(share of rows that are documents, tokens per byte of text or None) from rows all over the corpus."""
    from argonne.data.tokenizer import load_tokenizer, plain_ids

    tokenizer = (
        load_tokenizer(options.tokenizer_path, options.trust_remote_code) if options.tokenizer_path else None
    )
    rows = documents = size = tokens = 0
    for text in sampled_rows(shards, column):
        rows += 1
        if text:
            documents += 1
            part = text[:SAMPLED_CHARACTERS]
            size += len(part.encode())
            tokens += len(plain_ids(tokenizer, part)) + 1 if tokenizer is not None else 0
    return documents / max(rows, 1), tokens / max(size, 1) if tokenizer is not None else None


def sampled_rows(shards: Sequence[Shard], column: str) -> Iterator[str | None]:
    good = [shard for shard in shards if shard.rows]
    for shard in good[:: max(1, len(good) // SAMPLED_SHARDS)]:
        yield from middle_rows(shard, column)


def middle_rows(shard: Shard, column: str) -> list[str | None]:
    """The first rows of the shard's middle row group."""
    import pyarrow as pa

    from argonne.data.formats import LongText, one_line, open_shard

    texts: list[str | None] = []
    try:
        with open_shard(shard.path, column) as reader:
            for batch in reader.batches(len(shard.group_rows) // 2):
                texts += [
                    next(text.stretches()) if isinstance(text, LongText) else text for text in batch.texts
                ]
                if len(texts) >= SAMPLED_ROWS:
                    break
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {shard.path}: {one_line(error)}: repair it") from error
    return texts[:SAMPLED_ROWS]


# ----------------------------------------------------------------------------------------------------------
# A step


def show_step(options: argparse.Namespace) -> None:
    """Print the samples of one step. Raises ConfigError for a step or place that is not there."""
    from argonne.data.tokenizer import load_tokenizer
    from data_stream import open_stream

    tokenizer = load_tokenizer(options.tokenizer_path, options.trust_remote_code)
    saved = read_checkpoint(options.checkpoint_path) if options.checkpoint_path is not None else {}
    position, state = saved.get("data_position"), saved.get("data_state")
    if options.at is not None:
        position = parse_position(options)
    first = int(saved.get("global_step", 0))
    if options.metrics is not None and options.step > 0:
        position, first = metrics_position(options.metrics, options.step), options.step
    step = first if options.step is None else options.step
    if step < first:
        raise ConfigError(
            f"--step {step} lies before the checkpoint's step {first}: give an earlier checkpoint"
        )
    source = open_stream(
        source_options(options, state),
        tokenizer,
        saved_position=position,
        saved_state=state,
        global_step=first,
    )
    for notice in source.notices:
        print(f"warning: {notice}", file=sys.stderr)
    try:
        if options.at is not None:
            check_row(source)
        print_step(source, tokenizer, step, first, options)
    finally:
        source.source.close()


def source_options(options: argparse.Namespace, state: dict[str, Any] | None) -> SourceOptions:
    """What decides the tokens: the flags, and over them a checkpoint's ``data_state``."""
    from argonne.data.source import SourceOptions

    replicas = options.batch_size * options.gradient_accumulation_steps * options.data_parallel_size
    built = SourceOptions(
        data_glob=options.data_glob,
        block_size=options.block_size,
        samples_per_step=options.global_batch_size or replicas,
        text_column=options.text_column,
        streaming=not options.no_streaming,
        packing=not options.no_packing,
        seed=options.seed,
        num_proc=options.num_proc,
        trust_remote_code=options.trust_remote_code,
        skip_bad_shards=options.skip_bad_shards,
        allow_data_change=options.allow_data_change,
        cache_dir=options.cache_dir,
    )
    if state is not None:
        known = ("block_size", "samples_per_step", "text_column", "streaming", "packing", "seed")
        built = replace(built, **{key: state[key] for key in known})
    if not built.streaming and built.cache_dir is None:
        raise ConfigError("the shuffled order needs --cache-dir: give the run's cache folder")
    return built


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint that are not tensors; its weights stay on disk."""
    from inspect_checkpoint import newest_in

    from argonne.checkpoint.parts import open_any

    reader = open_any(newest_in(path))
    return {**reader.metadata, "global_step": reader.step}


def metrics_position(path: Path, step: int) -> dict[str, Any]:
    """Where ``step`` began: the place that the metrics record after the step before it."""
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if record.get("step") == step and "data_position" in record:
                    return record["data_position"]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} (--metrics): {error}") from error
    raise DataError(f"{path} has no place of the data for step {step} (--metrics): leave --metrics out")


def check_row(source: OpenedStream) -> None:
    place = source.start.position
    rows = source.shards[place.file_index].rows
    if place.row >= rows:
        raise ConfigError(f"--at names row {place.row}, {place.file_name} has {rows} (from 0)")


def parse_position(options: argparse.Namespace) -> dict[str, Any]:
    """--at as a ``data_position``; raises ConfigError."""
    from argonne.data.shards import find_shards, shard_names

    parts = options.at.rsplit(":", 2) if options.at.count(":") > 1 else [*options.at.rsplit(":", 1), "0"]
    if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
        raise ConfigError(f"--at {options.at!r} is not FILE:ROW or FILE:ROW:TOKEN")
    names = shard_names(find_shards(options.data_glob))
    if parts[0] not in names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(f"--at {options.at!r}: --data-glob gives no shard {parts[0]!r}, but {shown}")
    return {"file_name": parts[0], "row": int(parts[1]), "token_offset": int(parts[2]), "epoch": 0}


def print_step(
    source: OpenedStream, tokenizer: Any, step: int, first: int, options: argparse.Namespace
) -> None:
    from tqdm import tqdm

    before = source.start
    for _ in tqdm(range(first, step), desc="Finding the step", unit="step", disable=None):
        before = source.source.next_step().progress
    taken = source.source.next_step()
    place = before.position
    if options.at is None:
        print(f'step {step} ("step": {step + 1} in the metrics): {len(taken.tokens)} samples')
    if place.sample is None:
        print(f"from {place.file_name}, row {place.row}, token {place.token_offset}, epoch {place.epoch}")
    else:
        print(f"from sample {place.sample} of the shuffled order of epoch {place.epoch}")
    print(f"to   {describe(taken.progress.position)}; stream hash after it {taken.progress.stream_hash}")
    for index, sample in enumerate(taken.tokens[: options.samples]):
        text = tokenizer.decode(sample[:-1])
        shown = text[: options.characters] if options.characters else text
        cut = f"\n[... {len(text) - len(shown):,} more characters]" if len(shown) < len(text) else ""
        print(f"\n--- sample {index}: {len(sample) - 1} input tokens ---\n{shown}{cut}")


def describe(position: Any) -> str:
    if position.sample is not None:
        return f"sample {position.sample} of epoch {position.epoch}"
    return f"{position.file_name}, row {position.row}, token {position.token_offset}, epoch {position.epoch}"


if __name__ == "__main__":
    sys.exit(main())
