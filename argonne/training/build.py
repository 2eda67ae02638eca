"""From options to a model on its ranks: shape, degree, split, weights, optimizer.

Nothing here holds the whole model: it is described on the meta device, split there, and each rank then
makes and fills its own slices.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from argonne.config.derived import width_multiple
from argonne.config.options import ModelOptions, ParallelOptions, TrainingOptions
from argonne.config.presets import MODEL_KEYS, PRESETS, REFERENCE
from argonne.errors import ConfigError
from argonne.ranks.recompute import compile_blocks, enable_async_tp, recompute_blocks
from argonne.ranks.replicas import apply_ddp, apply_fsdp, local_parameters, local_tensor
from argonne.ranks.world import Parallel, World, build_parallel, replicas_of_a_node, resolve_tp_size
from argonne.training.model_config import resolve_model_config
from argonne.training.optimizer import build_adamw
from argonne.training.stored_teacher import StoredTeacher
from argonne.training.teacher import Teacher
from checkpointing import CheckpointView, LoadReport, load_slices
from model import ArgonneConfig, ArgonneModel, initial_std
from tp_shard import DTYPES, SliceMap, TensorParallelState, initialise_parameters, shard_tensor_parallel


@dataclass(eq=False, kw_only=True)
class TrainedModel:
    """The split model of this rank with its optimizer and the map of its slices."""

    model: ArgonneModel
    """The sharded model itself: parameter names are the unsharded ones."""
    wrapped: nn.Module
    """What a training forward pass calls: the model, or DDP around it."""
    slice_map: SliceMap
    """Tensor and data parallelism together."""
    optimizer: torch.optim.AdamW
    parallel: Parallel
    dtype: torch.dtype
    """Compute dtype; parameters are float32."""
    fsdp: bool
    teacher: Teacher | StoredTeacher | None = None
    """Whose word the loss takes in; never in optimizer or checkpoint."""

    @property
    def tensor_parallel(self) -> TensorParallelState:
        return self.model.tensor_parallel  # type: ignore[return-value]

    @property
    def tied(self) -> bool:
        return self.model.lm_head.weight is self.model.embed_tokens.weight

    def parameters(self) -> dict[str, Tensor]:
        """Local plain tensors by unsharded name."""
        return local_parameters(self.model)

    def adam(self) -> dict[str, dict[str, Tensor]]:
        """Local plain Adam state by unsharded name."""
        return {
            name: {key: local_tensor(value) for key, value in self.optimizer.state[parameter].items()}
            for name, parameter in self.model.named_parameters()
        }

    def adam_options(self) -> dict[str, Any]:
        """The optimizer's one group without its parameters: rate, betas, weight decay and so on."""
        group = self.optimizer.param_groups[0]
        return {key: value for key, value in group.items() if key != "params"}


def model_settings(
    options: ModelOptions, view: CheckpointView | None, tokenizer_length: int
) -> dict[str, Any]:
    """Keyword arguments of ArgonneConfig for this run.

    Without a checkpoint: what --model-config says, else Argonne 2.0. With one: the checkpoint's own; where
    it carries no configuration, its tensors', and the heads of --model-config. --local-attention off takes
    the window away. Raises ConfigError or CheckpointError naming both values where two of these, or the
    tokenizer, disagree.
    """
    without_window = {"interleaved_local_attention": False, "local_attention_window": None}
    off = without_window if options.local_attention == "off" else {}
    if view is None:
        settings = dict(options.settings or PRESETS[REFERENCE])
        if settings.get("vocab_size") is None:
            settings["vocab_size"] = tokenizer_length
    else:
        settings = resolve_model_config(view, options.model_config, options.settings, ignored=off)
    if settings["vocab_size"] < tokenizer_length:
        source = "the checkpoint" if view is not None else "--model-config"
        raise ConfigError(
            f"the tokenizer has {tokenizer_length} tokens and {source} a vocabulary of "
            f"{settings['vocab_size']}: give the tokenizer that belongs to it (--tokenizer-path)"
        )
    settings |= off
    return {key: value for key, value in settings.items() if key in MODEL_KEYS and value is not None}


def choose_tp_size(settings: Mapping[str, Any], requested: int | str | None, world: World) -> int:
    """The tensor-parallel degree, checked against heads and processes."""
    return resolve_tp_size(
        requested,
        world_size=world.world_size,
        local_world_size=world.local_world_size,
        query_heads=settings["num_attention_heads"],
    )


def make_parallel(settings: Mapping[str, Any], options: ParallelOptions, world: World) -> Parallel:
    """The degrees and groups that the flags ask for; collective. Raises ConfigError where they do not fit."""
    tp_size = choose_tp_size(settings, options.tensor_parallel_size, world)
    shard_size = None
    if options.data_parallel == "hsdp":
        shard_size = replicas_of_a_node(
            tp_size, world_size=world.world_size, node_size=world.local_world_size
        )
    return build_parallel(world, tp_size, shard_size=shard_size)


def choose_dtype(requested: str | None, device: torch.device) -> torch.dtype:
    """The compute dtype: bfloat16 on a GPU and float32 on a CPU unless asked otherwise."""
    return DTYPES[requested or ("bf16" if device.type == "cuda" else "fp32")]


def build_model(
    settings: Mapping[str, Any],
    options: ParallelOptions,
    training: TrainingOptions,
    parallel: Parallel,
    *,
    taught: bool = False,
) -> TrainedModel:
    """The split model on this rank's device, its slices not yet filled; ``taught``: beside a teacher."""
    dtype, chunk = choose_dtype(training.dtype, parallel.device), training.loss_chunk_tokens
    if options.async_tp:
        enable_async_tp(parallel, training.block_size)
    with torch.device("meta"):
        model = ArgonneModel(ArgonneConfig(**settings))
    shard_tensor_parallel(
        model,
        parallel.tp_group,
        sequence_parallel=options.sequence_parallel,
        # Beside a teacher head and loss go together, all at once too.
        loss_chunk_tokens=sys.maxsize if taught and chunk == 0 else chunk,
        pad_to=width_multiple(options, on_gpu=parallel.device.type == "cuda"),
    )
    recompute_blocks(model.blocks, options.activation_checkpointing)
    if options.compile:
        compile_blocks(model.blocks, async_tp=options.async_tp and parallel.tp_size > 1)
    fsdp = parallel.dp_size > 1 and options.data_parallel != "ddp"
    if fsdp:
        reshard = options.reshard_after_forward != "off"
        apply_fsdp(model, model.blocks, parallel, dtype, reshard_after_forward=reshard)
    model.to_empty(device=parallel.device).train()
    wrapped: nn.Module = model
    if parallel.dp_size > 1 and not fsdp:
        _zero_parameters(model)  # DDP compares and broadcasts what the replicas hold when it is made
        wrapped = apply_ddp(model, parallel)
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    return TrainedModel(
        model=model,
        wrapped=wrapped,
        slice_map=state.slice_map.with_data_parallel(
            parallel.dp_size, sharded=fsdp, shard_size=parallel.shard_size
        ),
        optimizer=_adamw(model, training, parallel.device),
        parallel=parallel,
        dtype=dtype,
        fsdp=fsdp,
    )


def _adamw(model: nn.Module, training: TrainingOptions, device: torch.device) -> torch.optim.AdamW:
    return build_adamw(
        dict(model.named_parameters()),
        lr=training.learning_rate,
        betas=training.adam_betas,
        weight_decay=training.weight_decay,
        device=device,
    )


def _zero_parameters(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().zero_()


def fill_weights(trained: TrainedModel, view: CheckpointView | None, seed: int) -> LoadReport | None:
    """Draw initial weights, or load weights and, of a checkpoint, Adam state; collective."""
    parameters, rank = trained.parameters(), trained.parallel.rank
    if view is None:
        config = trained.model.config
        initialise_parameters(
            parameters, trained.slice_map, rank, lambda name: initial_std(config, name), seed
        )
        return None
    for local in parameters.values():
        local.zero_()  # padding stays zero
    return load_slices(
        view,
        slice_map=trained.slice_map,
        rank=rank,
        parameters=parameters,
        adam={} if view.weights_only else trained.adam(),
        control_group=trained.parallel.control_group,
    )


def flops_per_token(trained: TrainedModel, block_size: int) -> float:
    """Training FLOPs of one token, forward and backward, with causal attention counted at half.

    6 N + 6 L s h a (PaLM, Chowdhery et al. 2022, appendix B, halved attention term), N without an untied
    embedding, which multiplies nothing.
    """
    config, slice_map = trained.model.config, trained.slice_map
    weights = slice_map.numel()
    if not trained.tied:
        weights -= slice_map.numel(["embed_tokens.weight"])
    width = config.num_attention_heads * config.head_dim
    return 6.0 * weights + 6.0 * config.num_hidden_layers * block_size * width
