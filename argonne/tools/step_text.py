"""The text that a training step sees, found by its number, its place, a checkpoint or the metrics."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argonne.errors import ConfigError, DataError
from argonne.tools.mixture_overview import samples_a_step

if TYPE_CHECKING:
    from argonne.data.source import SourceOptions
    from data_stream import OpenedStream


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
    from argonne.data.excluded import Exclusion
    from argonne.data.source import MixPart, SourceOptions

    built = SourceOptions(
        data_glob=options.data_glob,
        mix=tuple(MixPart(*source) for source in options.data_mix or ()),
        block_size=options.block_size,
        samples_per_step=samples_a_step(options),
        text_column=options.text_column or "text",
        token_column=options.token_column,
        streaming=not options.no_streaming,
        packing=not options.no_packing,
        shuffle=options.shuffle,
        holdout=options.holdout,
        exclude=options.exclude_documents,
        seed=options.seed,
        num_proc=options.num_proc,
        trust_remote_code=options.trust_remote_code,
        skip_bad_shards=options.skip_bad_shards,
        allow_data_change=options.allow_data_change,
        cache_dir=options.cache_dir,
    )
    if state is not None:
        known = ("block_size", "samples_per_step", "streaming", "packing", "seed")
        newer = {
            "shuffle": False,
            "holdout": None,
            "token_column": None,
        }  # what a checkpoint without these keys was trained with
        saved: dict[str, Any] = {key: state.get(key, value) for key, value in newer.items()}
        built = replace(built, **{key: state[key] for key in known}, **saved)
        if built.exclude is None:
            built = replace(built, exclude=Exclusion.of(state.get("excluded") or {}))
        if built.token_column is None:
            built = replace(built, text_column=state["text_column"])
    if not built.streaming and built.cache_dir is None:
        raise ConfigError("the shuffled order needs --cache-dir: give the run's cache folder")
    return built


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint that are not tensors; its weights stay on disk."""
    from argonne.checkpoint.parts import open_any

    reader = open_any(path)
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
    from argonne.data.find_shards import find_shards

    parts = options.at.rsplit(":", 2) if options.at.count(":") > 1 else [*options.at.rsplit(":", 1), "0"]
    if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
        raise ConfigError(f"--at {options.at!r} is not FILE:ROW or FILE:ROW:TOKEN")
    names = [found.name for found in find_shards(options.data_glob)]
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
    if options.at is None:
        print(f'step {step} ("step": {step + 1} in the metrics): {len(taken.tokens)} samples')
    ends = taken.progress.positions
    for name, place in before.positions.items():
        label = f"source {name}: " if name else ""
        if place.sample is None:
            print(f"{label}from {describe(place)}")
        else:
            print(f"{label}from sample {place.sample} of the shuffled order of epoch {place.epoch}")
        hashed = "" if name else f"; stream hash after it {taken.progress.stream_hash}"
        print(f"{label}to   {describe(ends[name])}{hashed}")
    names = source.source_names
    if names:
        print(f"stream hash after it {taken.progress.stream_hash}")
    for index, sample in enumerate(taken.tokens[: options.samples]):
        text = tokenizer.decode(sample[:-1])
        shown = text[: options.characters] if options.characters else text
        cut = f"\n[... {len(text) - len(shown):,} more characters]" if len(shown) < len(text) else ""
        origin = f" of {names[taken.sources[index]]}" if taken.sources is not None else ""
        print(f"\n--- sample {index}: {len(sample) - 1} input tokens{origin} ---\n{shown}{cut}")


def describe(position: Any) -> str:
    if position.sample is not None:
        return f"sample {position.sample} of epoch {position.epoch}"
    return f"{position.file_name}, row {position.row}, token {position.token_offset}, epoch {position.epoch}"
