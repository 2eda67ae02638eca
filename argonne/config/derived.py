"""What follows from the options of a run: its accumulation and the lengths of its schedule."""

import dataclasses
from fractions import Fraction

from argonne.config.options import ParallelOptions, TrainingOptions
from argonne.errors import ConfigError

_ALIGNED = 8
"""Elements: 16 bytes of a 16-bit row, which the tensor memory accelerator and vectorised loads want."""


def width_multiple(options: ParallelOptions, *, on_gpu: bool) -> int:
    """What local widths are padded to a multiple of; 1: nothing is padded for alignment."""
    on = options.pad_widths == "on" or (options.pad_widths == "auto" and on_gpu)
    return _ALIGNED if on else 1


def derive_accumulation(options: TrainingOptions, dp_size: int) -> int:
    """Micro-batches per optimizer step for ``dp_size`` model replicas.

    Raises:
        ConfigError: this batch size and number of replicas do not divide ``--global-batch-size``.
    """
    if options.global_batch_size is None:
        return options.gradient_accumulation_steps or 1
    micro = options.batch_size * dp_size
    accumulation, rest = divmod(options.global_batch_size, micro)
    if rest or accumulation == 0:
        raise ConfigError(
            f"--global-batch-size {options.global_batch_size} is not a multiple of --batch-size "
            f"{options.batch_size} x {dp_size} model replicas = {micro}: use a multiple of {micro}"
        )
    if options.gradient_accumulation_steps not in (None, accumulation):
        raise ConfigError(
            f"--global-batch-size {options.global_batch_size} needs {accumulation} micro-batches of "
            f"{options.batch_size} x {dp_size} replicas, but --gradient-accumulation-steps is "
            f"{options.gradient_accumulation_steps}: leave it out"
        )
    return accumulation


def schedule_problems(options: TrainingOptions) -> list[str]:
    """What is wrong with the lengths in a schedule whose ``total_steps`` are known."""
    source = f"--total-steps {options.total_steps}"
    if options.total_tokens is not None:
        source = f"the {options.total_steps} steps of --total-tokens {options.total_tokens}"
    problems = []
    default = TrainingOptions.warmup_steps  # a short run may end within the default warm-up
    if options.warmup_steps > options.total_steps and options.warmup_steps != default:
        problems.append(
            f"--warmup-steps {options.warmup_steps} exceeds {source}: "
            f"give fewer warm-up steps or more in total"
        )
    if (options.cooldown_steps or 0) > options.total_steps:
        problems.append(
            f"--cooldown-steps {options.cooldown_steps} exceeds {source}: "
            f"give fewer cooldown steps or more in total"
        )
    return problems


def derive_steps(options: TrainingOptions, samples_per_step: int) -> TrainingOptions:
    """The options with ``total_steps`` and ``cooldown_steps`` as numbers of optimizer steps.

    ``samples_per_step``: sequences of ``block_size`` tokens in each of them. Raises ConfigError where the
    warm-up or the cooldown exceeds the steps that --total-tokens makes.
    """
    if options.total_tokens is not None:
        steps = -(-options.total_tokens // (samples_per_step * options.block_size))
        options = dataclasses.replace(options, total_steps=steps)
    if options.cooldown_fraction is not None:
        # Exact, as written: in floating point 0.29 of 100 steps would be 28.
        steps = int(Fraction(str(options.cooldown_fraction)) * options.total_steps)
        options = dataclasses.replace(options, cooldown_steps=steps)
    if problems := schedule_problems(options):
        raise ConfigError("; ".join(problems))
    return options
