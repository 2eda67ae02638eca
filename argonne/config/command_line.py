"""The command line of ``resume_pretrain_tensor.py``: parse it, check it whole, and compare it between ranks.

Standard library only, so that a wrong flag ends the run (exit code 2, every problem in one go) before torch
is imported.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from argonne.config.flags import FlagParser, fill, flag_fields, flag_names, parse_given
from argonne.config.options import EPOCH_CHECKPOINT_INTERVAL, NO_CHECKPOINT, ModelOptions, RunConfig
from argonne.config.presets import load_model_settings
from argonne.errors import EXIT_USAGE, ConfigError

SILENT_SECONDS = 2.0
"""How long a rank that leaves the message to rank 0 waits before it ends."""


def _groups() -> Iterator[tuple[str, type]]:
    for field in dataclasses.fields(RunConfig):
        owner: object = field.default_factory
        if isinstance(owner, type) and dataclasses.is_dataclass(owner):
            yield field.name, owner


def build_parser() -> FlagParser:
    """The parser of ``resume_pretrain_tensor.py``; its namespace holds only the flags that were given."""
    parser = FlagParser(
        "resume_pretrain_tensor.py",
        "Pretrain an Argonne model with tensor parallelism, from scratch or from a checkpoint.",
    )
    for name, owner in _groups():
        parser.add_flags(name, owner)
    parser.add_flags("diagnosis", RunConfig)
    return parser


def _combination_problems(config: RunConfig, given: Mapping[str, Any]) -> list[str]:
    """Contradictions between flags that are each sound alone."""
    training, checkpoint = config.training, config.checkpoint
    problems = []
    if not config.data.tokenizer_path and "tokenizer_path" not in given:
        problems.append("--tokenizer-path is required: give the folder of a Hugging Face tokenizer")
    for field, rules in flag_fields(ModelOptions):
        if rules.refused and field.name in given:
            problems.append(f"{flag_names(field, rules)[0]} is refused: {rules.refused}; leave it out")
    if "token_column" in given and "text_column" in given:
        problems.append("--token-column contradicts --text-column: leave one out")
    if training.min_learning_rate > training.learning_rate:
        problems.append(
            f"--min-learning-rate {training.min_learning_rate:g} exceeds --learning-rate "
            f"{training.learning_rate:g}: lower it, or raise --learning-rate"
        )
    if "warmup_steps" in given and training.warmup_steps > training.total_steps:
        problems.append(
            f"--warmup-steps {training.warmup_steps} exceeds --total-steps {training.total_steps}: "
            f"give fewer warm-up steps or more in total"
        )
    if training.global_batch_size is not None:
        micro = training.batch_size * (training.gradient_accumulation_steps or 1)
        if training.global_batch_size % micro:
            problems.append(
                f"--global-batch-size {training.global_batch_size} is not a multiple of --batch-size "
                f"{training.batch_size} x --gradient-accumulation-steps "
                f"{training.gradient_accumulation_steps or 1}: change one of them"
            )
    if checkpoint.force_from_scratch and checkpoint.checkpoint_path not in (None, NO_CHECKPOINT):
        problems.append(
            f"--force-from-scratch contradicts --checkpoint-path {checkpoint.checkpoint_path}: leave one out"
        )
    return problems


def _build(given: Mapping[str, Any], settings: Mapping[str, Any] | None) -> RunConfig:
    groups: dict[str, Any] = {
        name: fill(owner, given) for name, owner in _groups() if owner is not ModelOptions
    }
    model = fill(ModelOptions, given, settings=settings)
    config = RunConfig(model=model, debug=given.get("debug", False), **groups)
    if config.data.streaming or "checkpoint_interval" in given:
        return config
    longer = dataclasses.replace(config.checkpoint, checkpoint_interval=EPOCH_CHECKPOINT_INTERVAL)
    return dataclasses.replace(config, checkpoint=longer)


def parse_command_line(argv: Sequence[str] | None = None) -> RunConfig:
    """The run that the command line asks for.

    Raises:
        SystemExit: code 2 after one ``error: ...`` line on stderr for every problem; code 0 after ``--help``.
            Every rank reads the same command line, so rank 0 prints for all; a problem with a file on
            another node is printed by the first rank there.
    """
    given, problems = parse_given(build_parser(), sys.argv[1:] if argv is None else argv)
    speaks = os.environ.get("RANK", "0") == "0"
    settings = None
    if given.get("model_config") is not None:
        try:
            settings = load_model_settings(given["model_config"])
        except ConfigError as error:
            problems.append(str(error))
            speaks = speaks or os.environ.get("LOCAL_RANK") == "0"
    config = _build(given, settings)
    problems += _combination_problems(config, given)
    if not problems:
        return config
    if speaks:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
    else:
        time.sleep(SILENT_SECONDS)  # the first rank to end makes torchrun kill the others: let rank 0 print
    raise SystemExit(EXIT_USAGE)


def flag_values(config: RunConfig) -> dict[str, Any]:
    """Flag -> value for every flag that all ranks must share (the local rank and ``--debug`` may differ)."""
    values: dict[str, Any] = {}
    for name, owner in _groups():
        for field, rules in flag_fields(owner):
            if field.name != "local_rank":
                values[flag_names(field, rules)[0]] = getattr(getattr(config, name), field.name)
    values["--model-config (content)"] = config.model.settings
    return values
