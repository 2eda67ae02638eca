"""How a run is operated: checkpoints, validation, what it records, when it steps aside, its plan.

What decides the weights of a run from the first step on stands in ``options.py``.
"""

import dataclasses

from argonne.config.devices import DEVICE_BYTES
from argonne.config.flags import duration, flag, named_glob, step_window
from argonne.config.tracker_packages import TRACKERS

SPIKE_ACTIONS = ("none", "skip", "rewind")
NO_CHECKPOINT = "NONE"
"""``--checkpoint-path`` of a run that starts from scratch."""
AUDIT_ACTIONS = ("warn", "stop")
ASYNC_CHOICES = ("auto", "on", "off")
STREAMING_CHECKPOINT_INTERVAL = 300
EPOCH_CHECKPOINT_INTERVAL = 2000
"""Default of ``--checkpoint-interval`` with ``--no-streaming``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Where the run starts from and what it saves."""

    checkpoint_path: str | None = flag(
        None,
        f"checkpoint file, or folder whose newest valid one to resume; {NO_CHECKPOINT}: from scratch",
        metavar="PATH",
        default_text="the newest in <output-dir>/pretrained, else from scratch",
    )
    init_from: str | None = flag(
        None,
        "take only the weights of a Hugging Face folder or of a checkpoint, and start at step 0",
        metavar="PATH",
        default_text="none",
    )
    force_from_scratch: bool = flag(False, "start at step 0 even if checkpoints exist")
    checkpoint_interval: int = flag(
        STREAMING_CHECKPOINT_INTERVAL,
        "optimizer steps between checkpoints",
        kind=int,
        at_least=1,
        default_text=f"{STREAMING_CHECKPOINT_INTERVAL}, with --no-streaming {EPOCH_CHECKPOINT_INTERVAL}",
    )
    keep_checkpoints: int = flag(3, "how many of the newest checkpoints to keep", kind=int, at_least=1)
    keep_every: int = flag(
        0, "also keep every checkpoint at a multiple of this step; 0: none", kind=int, at_least=0
    )
    async_checkpoint: str = flag(
        "auto",
        "write checkpoints in the background, from a copy in host memory; auto: with GPUs, where it has room",
        choices=ASYNC_CHOICES,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Held-out text and when its loss is measured."""

    eval_data: tuple[tuple[str, str], ...] = flag(
        (),
        "named validation sets: parquet shards that are not trained on; quote the globs",
        kind=named_glob,
        many=True,
        metavar="NAME=GLOB",
        default_text="none",
    )
    eval_interval: int = flag(
        1000,
        "optimizer steps between validations, the last step apart; 0: only there",
        kind=int,
        at_least=0,
    )
    eval_samples: int = flag(256, "sequences of each validation set, its first ones", kind=int, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the run writes and prints."""

    output_dir: str = flag(
        ".", "folder of pretrained/ and stats/", metavar="DIR", default_text="the current folder"
    )
    final_model_dir: str | None = flag(
        None,
        "export a Hugging Face model here at the end",
        metavar="DIR",
        default_text="no export",
    )
    log_interval: int = flag(50, "optimizer steps between log lines", kind=int, at_least=1)
    sample_interval: int = flag(
        1000, "optimizer steps between generated samples; 0: none", kind=int, at_least=0
    )
    sample_prompt: str = flag(
        "Long long time ago, ", "text that the samples go on from", default_text='"Long long time ago, "'
    )
    tracker: tuple[str, ...] = flag(
        (),
        "experiment trackers beside the metrics file",
        choices=TRACKERS,
        many=True,
        default_text="none",
    )
    profile: str | None = flag(
        None,
        "trace STEPS optimizer steps from step START on, into stats/profile/",
        kind=step_window,
        metavar="START:STEPS",
        default_text="none",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """When the run ends or steps aside on its own."""

    spike_action: str = flag(
        "none",
        "what a spike of loss or gradient norm does: nothing, skip the step, or go back to the last "
        "checkpoint and pass over the data since",
        choices=SPIKE_ACTIONS,
    )

    audit_interval: int = flag(
        1000,
        "optimizer steps between audits, each of which recomputes one layer unsharded on one rank; 0: never",
        kind=int,
        at_least=0,
    )
    audit_action: str = flag(
        "warn",
        "what to do when an audit fails: warn, or end the run without saving",
        choices=AUDIT_ACTIONS,
    )
    max_run_time: float | None = flag(
        None,
        "stop and save after this long: seconds, or 23h30m",
        kind=duration,
        above=0,
        metavar="TIME",
        default_text="no limit",
    )
    stall_timeout: float = flag(
        600.0,
        "abort and name the rank if one fails to join or makes no progress for this long; 0: never",
        kind=duration,
        at_least=0,
        metavar="TIME",
        default_text="600 s",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The file that describes the run."""

    config: str | None = flag(
        None,
        "recipe: a TOML file with flags as keys, and stages; the command line wins over it",
        metavar="FILE",
        default_text="none",
    )
    rehearse: bool = flag(False, "the whole recipe in minutes, scaled down, in a temporary folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a run would need and take, without running it."""

    plan: str | None = flag(
        None,
        "print memory, collectives, time and the layouts that fit, and end; needs no GPU",
        choices=("text", "json"),
        alone="text",
        default_text="train",
    )
    plan_world_size: int = flag(8, "ranks that --plan plans for", kind=int, at_least=1)
    plan_device: str = flag(
        "H100", f"device that --plan plans for: {', '.join(DEVICE_BYTES)}, or its bytes of memory"
    )
    ignore_plan: bool = flag(False, "train even where the plan does not fit the devices")
