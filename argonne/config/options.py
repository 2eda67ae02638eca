"""The options of a run: one frozen dataclass for each group of flags, with defaults, rules and help.

Parser, checks, ``--help`` and the README's table all come from these fields (``flags.py``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from argonne.config.distillation import DistillationOptions
from argonne.config.flags import flag
from argonne.config.mixture import MIX_FORM, MixedSource, mixed_source
from argonne.config.presets import PRESETS
from argonne.config.run_options import (
    CheckpointOptions,
    ControlOptions,
    EvaluationOptions,
    OutputOptions,
    PlanOptions,
    RecipeOptions,
)

SCHEDULES = ("cosine", "wsd", "linear", "constant")
AUTO = "auto"
"""Left to the plan."""


def degree(text: str) -> int | str:
    """A number of ranks, or ``auto``; raises ValueError."""
    return AUTO if text.strip().lower() == AUTO else int(text)


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
    exclude_documents: str | None = flag(
        None,
        "leave out the documents listed in this file (scripts/find_document.py writes one)",
        metavar="FILE",
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
    others: bool = False
    """Whether other stages may read other data; no flag."""


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

    tensor_parallel_size: int | str | None = flag(
        None,
        "ranks that share one model replica; auto: the layout that the plan predicts to be the fastest that "
        "fits, where --batch-size counts sequences per GPU",
        kind=degree,
        metavar="N|auto",
        at_least=1,
        default_text="the largest that divides the ranks of a node and the query heads",
    )
    sequence_parallel: bool = flag(False, "shard norms and the residual stream along the sequence")
    data_parallel: str = flag(
        "fsdp",
        "data parallelism over the replicas; hsdp: shard within a node, replicate across nodes",
        choices=("fsdp", "hsdp", "ddp"),
    )
    reshard_after_forward: str = flag(
        AUTO,
        "free a block's gathered weights (fsdp, hsdp) after its forward pass, and gather them again for the "
        "backward pass; auto: keep them on GPUs where the plan finds room, else free them",
        choices=(AUTO, "on", "off"),
    )
    activation_checkpointing: str = flag(
        "none", "what the backward pass recomputes", choices=("none", "full", "selective")
    )
    compile: bool = flag(False, "compile each block with torch.compile")
    async_tp: bool = flag(
        False,
        "overlap products with their gathers and scatters piece by piece (torch's asynchronous tensor "
        "parallelism); needs --compile and --sequence-parallel",
    )
    pad_widths: str = flag(
        "auto",
        "pad heads, and slices of MLP and vocabulary, with zeros to a multiple of 8; auto: on GPUs",
        choices=("auto", "on", "off"),
    )
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
class RunConfig:
    """Everything a run was asked to do."""

    recipe: RecipeOptions = dataclasses.field(default_factory=RecipeOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    training: TrainingOptions = dataclasses.field(default_factory=TrainingOptions)
    parallel: ParallelOptions = dataclasses.field(default_factory=ParallelOptions)
    distillation: DistillationOptions = dataclasses.field(default_factory=DistillationOptions)
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = dataclasses.field(default_factory=EvaluationOptions)
    output: OutputOptions = dataclasses.field(default_factory=OutputOptions)
    control: ControlOptions = dataclasses.field(default_factory=ControlOptions)
    planning: PlanOptions = dataclasses.field(default_factory=PlanOptions)
    debug: bool = flag(False, "print the traceback of an error")
