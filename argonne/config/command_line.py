"""The command line of ``resume_pretrain_tensor.py`` and its recipe file: parse them and check them whole.

Standard library only, so that a wrong flag ends the run (exit code 2, every problem in one go) before torch
is imported.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from argonne.config.derived import schedule_problems
from argonne.config.devices import device_bytes
from argonne.config.distillation import distillation_problems
from argonne.config.families import read_folder_config
from argonne.config.flags import FlagParser, fill, parse_given
from argonne.config.mixture import mixture_problems
from argonne.config.options import AUTO, ModelOptions, ParallelOptions, RunConfig, TrainingOptions
from argonne.config.presets import load_model_settings
from argonne.config.recipe import Recipe, Stage, groups, overlay
from argonne.config.recipe_file import Layer, read_layers
from argonne.config.run_options import EPOCH_CHECKPOINT_INTERVAL, NO_CHECKPOINT, CheckpointOptions
from argonne.config.tracker_packages import tracker_problems
from argonne.errors import EXIT_USAGE, ConfigError

Layers = tuple[Layer, tuple[Layer, ...]]
"""The top of a recipe file, and its stages."""
SILENT_SECONDS = 2.0
"""How long a rank that leaves the message to rank 0 waits before it ends."""
NO_TOKENIZER = "--tokenizer-path is required: give the folder of a Hugging Face tokenizer"


def build_parser() -> FlagParser:
    """The parser of ``resume_pretrain_tensor.py``; its namespace holds only the flags that were given."""
    parser = FlagParser(
        "resume_pretrain_tensor.py",
        "Pretrain an Argonne model with tensor parallelism, from scratch or from a checkpoint.",
    )
    for name, owner in groups():
        parser.add_flags(name, owner)
    parser.add_flags("diagnosis", RunConfig)
    return parser


def _schedule_problems(training: TrainingOptions, given: Mapping[str, Any]) -> list[str]:
    problems = []
    for one, other in (("total_steps", "total_tokens"), ("cooldown_steps", "cooldown_fraction")):
        if one in given and other in given:
            names = [f"--{name.replace('_', '-')}" for name in (one, other)]
            problems.append(f"{names[0]} contradicts {names[1]}: leave one out")
    cooldowns = [name for name in ("cooldown_steps", "cooldown_fraction") if name in given]
    if training.lr_schedule == "wsd" and not cooldowns:
        problems.append("--lr-schedule wsd needs --cooldown-steps or --cooldown-fraction: give one of them")
    if training.lr_schedule != "wsd":
        problems += [
            f"--{name.replace('_', '-')} is of --lr-schedule wsd, and the schedule is "
            f"{training.lr_schedule}: leave it out, or give --lr-schedule wsd"
            for name in cooldowns
        ]
    if training.total_tokens is None:
        problems += schedule_problems(training)
    return problems


def _combination_problems(config: RunConfig, given: Mapping[str, Any]) -> list[str]:
    """Contradictions between flags that are each sound alone."""
    training, checkpoint = config.training, config.checkpoint
    problems = []
    try:
        device_bytes(config.planning.plan_device)
    except ConfigError as error:
        problems.append(str(error))
    planned = config.planning.plan is not None
    if not config.data.tokenizer_path and "tokenizer_path" not in given and not planned:
        problems.append(NO_TOKENIZER)
    problems += distillation_problems(config.distillation, given)
    if "token_column" in given and "text_column" in given and "data_mix" not in given:
        problems.append("--token-column contradicts --text-column: leave one out")
    if training.min_learning_rate > training.learning_rate:
        problems.append(
            f"--min-learning-rate {training.min_learning_rate:g} exceeds --learning-rate "
            f"{training.learning_rate:g}: lower it, or raise --learning-rate"
        )
    problems += _schedule_problems(training, given)
    automatic = config.parallel.tensor_parallel_size == AUTO
    if automatic and training.global_batch_size and training.gradient_accumulation_steps:
        problems.append(
            "--gradient-accumulation-steps contradicts --global-batch-size under "
            "--tensor-parallel-size auto, which derives it: leave it out"
        )
    if training.global_batch_size is not None and not automatic:
        micro = training.batch_size * (training.gradient_accumulation_steps or 1)
        if training.global_batch_size % micro:
            problems.append(
                f"--global-batch-size {training.global_batch_size} is not a multiple of --batch-size "
                f"{training.batch_size} x --gradient-accumulation-steps "
                f"{training.gradient_accumulation_steps or 1}: change one of them"
            )
    problems += _parallel_problems(config.parallel)
    problems += mixture_problems(given)
    if config.data.shuffle and not config.data.streaming:
        problems.append("--shuffle contradicts --no-streaming, which has its own order: leave one out")
    if checkpoint.force_from_scratch and checkpoint.checkpoint_path not in (None, NO_CHECKPOINT):
        problems.append(
            f"--force-from-scratch contradicts --checkpoint-path {checkpoint.checkpoint_path}: leave one out"
        )
    names = [name for name, _ in config.evaluation.eval_data]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"--eval-data names {name} twice: give each set a name of its own")
    if checkpoint.init_from is not None:
        problems += _initial_problems(checkpoint, given)
    return problems


def _parallel_problems(parallel: ParallelOptions) -> list[str]:
    """What ``--async-tp`` lacks: it is a rewriting of compiled blocks' sequence-parallel collectives."""
    needed = {"--compile": parallel.compile, "--sequence-parallel": parallel.sequence_parallel}
    missing = [name for name, given in needed.items() if not given]
    if not parallel.async_tp or not missing:
        return []
    return [f"--async-tp needs {' and '.join(missing)}: add {'it' if len(missing) == 1 else 'them'}"]


def _initial_problems(checkpoint: CheckpointOptions, given: Mapping[str, Any]) -> list[str]:
    """What contradicts ``--init-from``, and what of its config.json this architecture does not express."""
    others = {"--checkpoint-path": "checkpoint_path", "--force-from-scratch": "force_from_scratch"}
    problems = [
        f"--init-from {checkpoint.init_from} contradicts {flag}: leave one of them out"
        for flag, name in others.items()
        if name in given
    ]
    folder = Path(checkpoint.init_from or "").expanduser()
    if (folder / "config.json").is_file():
        try:
            read_folder_config(folder, "--init-from")
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _build(given: Mapping[str, Any], settings: Mapping[str, Any] | None) -> RunConfig:
    filled: dict[str, Any] = {
        name: fill(owner, given) for name, owner in groups() if owner is not ModelOptions
    }
    model = fill(ModelOptions, given, settings=settings)
    config = RunConfig(model=model, debug=given.get("debug", False), **filled)
    if config.data.streaming or "checkpoint_interval" in given:
        return config
    longer = dataclasses.replace(config.checkpoint, checkpoint_interval=EPOCH_CHECKPOINT_INTERVAL)
    return dataclasses.replace(config, checkpoint=longer)


def _recipe(given: Mapping[str, Any], layers: Layers, settings: Mapping[str, Any] | None) -> Recipe:
    top, stages = layers
    return Recipe(
        stages=tuple(
            Stage(
                config=_build(overlay(top.given, layer.given, given), settings),
                name=layer.name,
                reset_optimizer=layer.reset_optimizer,
            )
            for layer in stages or (Layer(given={}),)
        )
    )


def _recipe_problems(recipe: Recipe, given: Mapping[str, Any], layers: Layers) -> list[str]:
    """Contradictions in any stage; those of all stages once, others with the stage's name."""
    top, stages = layers
    found = [
        _combination_problems(stage.config, overlay(top.given, layer.given, given))
        for stage, layer in zip(recipe.stages, stages or (top,), strict=True)
    ]
    lines = [problem for problem in found[0] if all(problem in other for other in found)]
    if len(recipe.stages) > 1 and (folder := recipe.config.distillation.teacher_targets) is not None:
        lines.append(
            f"--teacher-targets {folder} is of one stream, and the recipe has {len(recipe.stages)} stages: "
            "run them one by one (--init-from), or give --teacher-path"
        )
    for stage, problems in zip(recipe.stages, found, strict=True):
        lines += [f"stage {stage.name}: {problem}" for problem in problems if problem not in lines]
    return lines


def parse_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """The run that the command line and the file of its ``--config`` ask for, stage by stage.

    Raises:
        SystemExit: code 2 after one ``error: ...`` line on stderr for every problem; code 0 after ``--help``.
            Every rank reads the same command line, so rank 0 prints for all; a problem with a file on
            another node is printed by the first rank there.
    """
    given, problems = parse_given(build_parser(), sys.argv[1:] if argv is None else argv)
    speaks = os.environ.get("RANK", "0") == "0"
    layers: Layers = Layer(given={}), ()
    settings = None
    read = not any(problem.startswith("--config") for problem in problems)
    try:
        if given.get("config") is not None:
            read = False
            top, stages, wrong = read_layers(given["config"])
            layers, read = (top, stages), True
            problems += wrong
        model_config = overlay(layers[0].given, given).get("model_config")
        if model_config is not None:
            settings = load_model_settings(model_config)
    except ConfigError as error:
        problems.append(str(error))
        speaks = speaks or os.environ.get("LOCAL_RANK") == "0"
    recipe = _recipe(given, layers, settings)
    if read:  # what a file that was not read would have given is not missing
        named = any("tokenizer-path" in problem for problem in problems)  # without its value, or misspelled
        others = _recipe_problems(recipe, given, layers)
        problems += [line for line in others if not named or line != NO_TOKENIZER]
    if os.environ.get("GROUP_RANK", "0") == "0":  # rank 0 reports, and it runs on this node
        problems += tracker_problems(recipe.config.output.tracker)
    if not problems:
        return recipe
    if speaks:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
    else:
        time.sleep(SILENT_SECONDS)  # the first rank to end makes torchrun kill the others: let rank 0 print
    raise SystemExit(EXIT_USAGE)


def parse_command_line(argv: Sequence[str] | None = None) -> RunConfig:
    """As `parse_recipe`, for who asks about flags alone: the configuration of the first stage."""
    return parse_recipe(argv).config
