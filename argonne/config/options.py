"""The options of a run: one frozen dataclass for each group of flags, with defaults, rules and help.

Parser, checks, ``--help`` and the README's table all come from these fields (``flags.py``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from argonne.config.devices import DEVICE_BYTES
from argonne.config.flags import duration, flag, named_glob
from argonne.config.mixture import MIX_FORM, MixedSource, mixed_source
from argonne.config.presets import PRESETS

NO_CHECKPOINT = "NONE"
"""``--checkpoint-path`` of a run that starts from scratch."""
STREAMING_CHECKPOINT_INTERVAL = 300
SCHEDULES = ("cosine", "wsd", "linear", "constant")
EPOCH_CHECKPOINT_INTERVAL = 2000
"""Default of ``--checkpoint-interval`` with ``--no-streaming``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is trained."""

    model_config: str | None = flag(
        None,
        f"shape of the model: {', '.join(PRESETS)}, or a config.json",
        metavar="NAME|FILE",
        default_text="the checkpoint's own, else argonne-2.0",
    )
    local_attention: str = flag(
        "config",
        "window of the odd layers: as the model's configuration says, or none",
        choices=("config", "off"),
    )
    settings: Mapping[str, Any] | None = None
    """Keyword arguments of ArgonneConfig of the shape that ``--model-config`` names; None without it."""
    teacher_path: str | None = flag(
        None, "teacher for distillation", refused="distillation is not implemented yet"
    )
    teacher_device_map: str | None = flag(
        None, "placement of the teacher", refused="distillation is not implemented yet"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the text comes from and how it becomes samples."""

    tokenizer_path: str = flag("", "folder or name of the tokenizer", metavar="PATH", default_text="required")
    trust_remote_code: bool = flag(False, "let the tokenizer run the code in its folder")
    data_glob: tuple[str, ...] = flag(
        ("../data/CC-MAIN-2025-26/*.parquet",),
        "shards: pattern (quote it), file, folder or URL; may be repeated",
        metavar="GLOB",
        repeated=True,
    )
    data_mix: tuple[MixedSource, ...] = flag(
        (),
        "sources to mix by weight, in place of --data-glob; quote the globs",
        kind=mixed_source,
        many=True,
        metavar=MIX_FORM,
        default_text="one source",
    )
    shuffle: bool = flag(False, "shuffle shards, row groups and rows anew each epoch")
    holdout: int | None = flag(
        None,
        "hold every N-th document, by a hash of its text, out of training",
        kind=int,
        at_least=2,
        default_text="none",
    )
    text_column: str = flag("text", "column that holds the documents", metavar="NAME")
    token_column: str | None = flag(
        None, "list column of token ids, instead of text", metavar="NAME", default_text="the data is text"
    )
    streaming: bool = flag(
        True,
        "tokenize the corpus once into a cache and shuffle each epoch, instead of streaming",
        names=("--no-streaming",),
    )
    packing: bool = flag(
        True,
        "cut each document on its own, dropping short documents and tails, instead of packing",
        names=("--no-packing",),
    )
    document_attention: bool = flag(False, "let a token attend within its own document only")
    num_proc: int = flag(8, "tokenizing processes, at most one per CPU core", kind=int, at_least=1)
    data_cache_dir: str | None = flag(
        None,
        "cache of the tokenized corpus; given, also of what is read of remote shards",
        metavar="DIR",
        default_text="<output-dir>/cache",
    )
    skip_bad_shards: bool = flag(False, "skip and record unreadable data instead of failing")
    allow_data_change: bool = flag(False, "resume even if shards were removed, renamed or rewritten")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Batches, optimizer, schedule and dtype."""

    batch_size: int = flag(4, "sequences per model replica and micro-batch", kind=int, at_least=1)
    block_size: int = flag(4096, "tokens per sequence", kind=int, at_least=2)
    gradient_accumulation_steps: int | None = flag(
        None,
        "micro-batches per optimizer step",
        kind=int,
        at_least=1,
        default_text="1, or what --global-batch-size asks for",
    )
    global_batch_size: int | None = flag(
        None, "sequences per optimizer step over all replicas; sets the accumulation", kind=int, at_least=1
    )
    loss_chunk_tokens: int | None = flag(
        None,
        "tokens of a micro-batch whose logits are held at a time; 0: all at once",
        kind=int,
        at_least=0,
        default_text="as many as 256 MiB of logits take",
    )
    learning_rate: float = flag(1e-4, "peak learning rate", kind=float, above=0)
    min_learning_rate: float = flag(1e-5, "learning rate at step 0 and at the end", kind=float, at_least=0)
    warmup_steps: int = flag(2000, "optimizer steps of linear warm-up", kind=int, at_least=0)
    total_steps: int = flag(4_000_000, "optimizer steps of the whole schedule", kind=int, at_least=1)
    total_tokens: int | None = flag(
        None,
        "tokens of the whole schedule, rounded up to a step",
        kind=int,
        at_least=1,
        default_text="--total-steps",
    )
    lr_schedule: str = flag(
        "cosine", "learning rate from the warm-up to the end of the schedule", choices=SCHEDULES
    )
    cooldown_steps: int | None = flag(
        None,
        "optimizer steps over which wsd falls to the minimum at the end",
        kind=int,
        at_least=0,
        default_text="required by wsd, unless --cooldown-fraction is given",
    )
    cooldown_fraction: float | None = flag(
        None,
        "the same as a share of the schedule's steps, rounded down",
        kind=float,
        at_least=0,
        at_most=1,
        default_text="--cooldown-steps",
    )
    weight_decay: float = flag(0.1, "weight decay of AdamW", kind=float, at_least=0)
    grad_clip: float = flag(1.0, "clip the global gradient norm to this", kind=float, above=0)
    adam_betas: tuple[float, float] = flag(
        (0.9, 0.999),
        "AdamW betas",
        kind=float,
        count=2,
        at_least=0,
        below=1,
        metavar="BETA",
    )
    seed: int = flag(42, "seed of initial weights and shuffle", kind=int, at_least=0, below=2**63)
    dtype: str | None = flag(
        None,
        "compute dtype",
        choices=("fp32", "bf16", "fp16"),
        default_text="bf16 on GPUs, fp32 on CPUs",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How the model and the batch are distributed over the ranks."""

    tensor_parallel_size: int | None = flag(
        None,
        "ranks that share one model replica",
        kind=int,
        at_least=1,
        default_text="the largest that divides the ranks of a node and fits the heads",
    )
    sequence_parallel: bool = flag(False, "shard norms and the residual stream along the sequence")
    data_parallel: str = flag("fsdp", "data parallelism over the replicas", choices=("fsdp", "ddp"))
    activation_checkpointing: str = flag(
        "none", "what the backward pass recomputes", choices=("none", "full", "selective")
    )
    compile: bool = flag(False, "compile each block with torch.compile")
    verify_sharding: bool = flag(False, "before training, compare the sharded model with the unsharded one")
    replica_check_interval: int = flag(
        100, "optimizer steps between checks of replicated weights; 0: never", kind=int, at_least=0
    )
    local_rank: int | None = flag(
        None,
        "rank within the node, for launchers that set no LOCAL_RANK",
        kind=int,
        at_least=0,
        names=("--local_rank", "--local-rank"),
        default_text="the environment's",
    )


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
    sample_interval: int = flag(0, "optimizer steps between generated samples; 0: none", kind=int, at_least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """When the run ends on its own."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run was asked to do."""

    recipe: RecipeOptions = dataclasses.field(default_factory=RecipeOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    training: TrainingOptions = dataclasses.field(default_factory=TrainingOptions)
    parallel: ParallelOptions = dataclasses.field(default_factory=ParallelOptions)
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = dataclasses.field(default_factory=EvaluationOptions)
    output: OutputOptions = dataclasses.field(default_factory=OutputOptions)
    control: ControlOptions = dataclasses.field(default_factory=ControlOptions)
    planning: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    debug: bool = flag(False, "print the traceback of an error")
