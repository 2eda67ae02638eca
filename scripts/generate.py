#!/usr/bin/env python3
"""Continue a prompt with a checkpoint (ours or a pipeline run's) or with an exported Hugging Face folder.

    scripts/generate.py --checkpoint-path RUN/pretrained --tokenizer-path TOKENIZER --prompt "Once upon"
    torchrun --standalone --nproc_per_node=8 scripts/generate.py --checkpoint-path ... --tokenizer-path ...

Alone, or split over the processes of torchrun, of which each reads its own slices. The text goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.presets import MODEL_KEYS, PRESETS, REFERENCE
from argonne.errors import ConfigError
from argonne.run.processes import end_with
from argonne.tools.script import OneLineParser, run_script, said_by_rank_0

if TYPE_CHECKING:
    import torch

    from argonne.ranks.launch import Environment
    from argonne.ranks.world import Parallel, World
    from checkpointing import CheckpointView
    from model import ArgonneModel
    from tp_shard import SliceMap, TensorParallelState

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A split model for generating alone."""

    model: ArgonneModel
    slice_map: SliceMap
    parallel: Parallel
    dtype: torch.dtype
    fsdp: bool = False


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("Continue a prompt with a trained model.")
    parser.add_argument(
        "--checkpoint-path",
        required=True,
        help="checkpoint file, folder of checkpoints (the newest), or a folder of weights (an export)",
    )
    parser.add_argument(
        "--model-config",
        help="preset or config.json; gives the head counts where the checkpoint has no model_config "
        f"({REFERENCE})",
    )
    parser.add_argument("--tokenizer-path", help="tokenizer folder (an export brings its own)")
    parser.add_argument("--prompt", default="Long long time ago, ", help="beginning of the text")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=50, help="0: draw from all tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="(bf16 on GPUs, fp32 on CPUs)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, metavar="N", help="processes that share the model"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")
    return parser


def is_export(path: Path) -> bool:
    """Whether the folder looks like what scripts/export_hf.py writes."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError with every problem of the flags."""
    problems = []
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not getattr(options, name) >= least:
            flag = "--" + name.replace("_", "-")
            problems.append(f"{flag} {getattr(options, name)}: must be at least {least}")
    path = Path(options.checkpoint_path).expanduser()
    if options.tokenizer_path is None:
        if is_export(path):
            options.tokenizer_path = str(path)
        else:
            problems.append("--tokenizer-path is required: give the folder of the model's tokenizer")
    if problems:
        raise ConfigError("; ".join(problems))


def empty_model(settings: dict[str, Any], options: argparse.Namespace, world: World) -> LoadedModel:
    """The split model on this rank's device, its slices not yet filled."""
    import torch

    from argonne.ranks.world import build_parallel
    from argonne.training.build import choose_dtype, choose_tp_size
    from model import ArgonneConfig, ArgonneModel
    from tp_shard import shard_tensor_parallel

    parallel = build_parallel(world, choose_tp_size(settings, options.tensor_parallel_size, world))
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**settings))
    shard_tensor_parallel(model, parallel.tp_group)
    model.to_empty(device=parallel.device)
    for parameter in model.parameters():
        parameter.detach().zero_()  # padding stays zero
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    return LoadedModel(
        model=model,
        slice_map=state.slice_map,
        parallel=parallel,
        dtype=choose_dtype(options.dtype, parallel.device),
    )


def load_checkpoint(options: argparse.Namespace, world: World) -> LoadedModel:
    """The model of a checkpoint; every rank reads its own slices, or gets them from rank 0."""
    from argonne.training.model_config import resolve_model_config
    from checkpointing import open_chosen

    view, reason, warnings = open_chosen(
        options.checkpoint_path,
        Path(),
        force_from_scratch=False,
        rank=world.rank,
        control_group=world.control_group,
    )
    if view is None:
        raise ConfigError(f"--checkpoint-path {options.checkpoint_path}: {reason}; name a checkpoint")
    return loaded_from(view, resolve_model_config(view, options.model_config), warnings, options, world)


def loaded_from(
    view: CheckpointView,
    config: dict[str, Any],
    warnings: Sequence[str],
    options: argparse.Namespace,
    world: World,
) -> LoadedModel:
    """The split model with its slices from an open checkpoint; collective."""
    from argonne.ranks.replicas import local_parameters
    from checkpointing import load_slices

    settings = {key: config[key] for key in MODEL_KEYS if config.get(key) is not None}
    loaded = empty_model(settings, options, world)
    report = load_slices(
        view,
        slice_map=loaded.slice_map,
        rank=loaded.parallel.tp_rank,
        parameters=local_parameters(loaded.model),
        adam={},
        control_group=world.control_group,
    )
    if world.rank == 0:
        for warning in (*warnings, *report.warnings):
            print(f"warning: {warning}", file=sys.stderr)
    return loaded


def load_export(folder: Path, options: argparse.Namespace, world: World) -> LoadedModel:
    """The model of an exported folder, or of another one of weights that this architecture expresses."""
    from argonne.config.families import read_folder_config
    from checkpointing import InitialWeights, open_weights

    initial = InitialWeights(path=str(folder), folder_config=read_folder_config, flag="--checkpoint-path")
    view, warnings = open_weights(initial, rank=world.rank, control_group=world.control_group)
    return loaded_from(view, view.metadata["model_config"], warnings, options, world)


def run(options: argparse.Namespace, environment: Environment) -> str:
    """Connect, load, generate; the text on rank 0 and "" elsewhere."""
    from argonne.checkpoint.export_hf import quiet_transformers
    from argonne.data.tokenizer import load_tokenizer
    from argonne.ranks.agree import broadcast_object, only_on_rank_0
    from argonne.ranks.meeting import await_ranks, open_store
    from argonne.ranks.world import choose_device, connect, disconnect
    from argonne.training.generation import generate_text
    from checkpointing import require_safe_torch

    require_safe_torch()
    device = choose_device(environment)
    store = open_store(environment, timeout=TIMEOUT)
    if store is not None:
        await_ranks(environment, store, timeout=TIMEOUT)
    world = connect(environment, device, store, timeout=TIMEOUT)
    with quiet_transformers():
        tokenizer = only_on_rank_0(
            lambda: load_tokenizer(options.tokenizer_path, options.trust_remote_code), world
        )
        size = broadcast_object(None if tokenizer is None else len(tokenizer), world)
        path = Path(options.checkpoint_path).expanduser()
        loaded = load_export(path, options, world) if is_export(path) else load_checkpoint(options, world)
        vocabulary = loaded.model.config.vocab_size
        if size > vocabulary:
            raise ConfigError(
                f"the tokenizer has {size} tokens and the model a vocabulary of {vocabulary}: give the "
                "tokenizer that belongs to it (--tokenizer-path)"
            )
        text = generate_text(
            loaded,
            tokenizer,
            prompt=options.prompt,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
        )
    disconnect()
    return text


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)

    def work() -> None:
        check(options)

        from argonne.ranks.gpu_environment import one_queue_helps, set_gpu_environment
        from argonne.ranks.launch import Environment

        environment = Environment.read()
        heads = PRESETS[REFERENCE]["num_attention_heads"]  # the model is not open yet
        one_queue = one_queue_helps(environment, options.tensor_parallel_size, heads, fsdp=False)
        set_gpu_environment(os.environ, one_queue=one_queue)
        with said_by_rank_0(environment.rank):
            text = run(options, environment)
        if environment.rank == 0:
            print(text)

    return run_script(work)


if __name__ == "__main__":
    end_with(main)
