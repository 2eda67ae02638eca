"""The same model twice: this suite's step, and transformers' Llama with PyTorch's tensor parallelism.

The peer is written as its documentation advises (torch.distributed.tensor.parallel, torchtitan's plan): one
input layout per attention and MLP block, so that q/k/v and gate/up share one reduction, vocabulary-parallel
loss, fused AdamW. The naive variant splits each linear layer for itself, as transformers' own ``tp_plan``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM

from argonne.config.options import ParallelOptions, TrainingOptions
from argonne.data.feed import StepBatch
from argonne.ranks.world import Parallel, World, build_parallel
from argonne.testing.hf_reference import llama_like, llama_name
from argonne.tp.group import TPGroup
from argonne.training.build import TrainedModel, build_model, fill_weights
from argonne.training.step import TrainingStep, Votes
from model import ArgonneConfig
from tp_shard import gather_state_dict

LEARNING_RATE = 1e-4
CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and the tokens of one step."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    vocab_size: int = 16384
    batch: int = 2
    seq_len: int = 256

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of ArgonneConfig."""
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
        }

    def tokens(self) -> Tensor:
        """(batch, seq_len + 1) int32, the same everywhere."""
        generator = torch.Generator().manual_seed(5)
        return torch.randint(
            0, self.vocab_size, (self.batch, self.seq_len + 1), generator=generator, dtype=torch.int32
        )


SHAPES = {
    "h512": Shape(hidden_size=512, layers=4, heads=8, key_value_heads=4, intermediate_size=1408),
    "h768": Shape(hidden_size=768, layers=6, heads=12, key_value_heads=4, intermediate_size=2048),
}


class _Alone(Parallel):
    """One process without a group, also where the process belongs to a world of several."""

    @property
    def tp_group(self) -> Any:
        return TPGroup(0, 1)

    @property
    def world_group(self) -> None:
        return None


def alone(device: torch.device | str = "cpu") -> Parallel:
    return _Alone(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device(device),
        control_group=None, feed_group=None, tp_rank=0, tp_size=1, dp_rank=0, dp_size=1, mesh=None,
    )  # fmt: skip


def split_over(size: int) -> Parallel:
    """Tensor parallelism over all ranks of the process group, on the CPU."""
    rank = dist.get_rank()
    world = World(
        rank=rank, world_size=size, local_rank=rank, local_world_size=size, device=torch.device("cpu"),
        control_group=dist.group.WORLD, feed_group=None,
    )  # fmt: skip
    return build_parallel(world, size)


def training_options(shape: Shape) -> TrainingOptions:
    return TrainingOptions(
        batch_size=shape.batch, block_size=shape.seq_len, learning_rate=LEARNING_RATE,
        min_learning_rate=LEARNING_RATE, warmup_steps=0, total_steps=1_000_000, grad_clip=CLIP,
    )  # fmt: skip


def our_model(
    shape: Shape, parallel: Parallel, *, sequence_parallel: bool = False, **options: Any
) -> TrainedModel:
    """Split, drawn and with its optimizer, exactly as the training script does it."""
    choices = ParallelOptions(sequence_parallel=sequence_parallel, **options)
    trained = build_model(shape.settings(), choices, training_options(shape), parallel)
    fill_weights(trained, None, seed=11)
    return trained


def our_step(trained: TrainedModel, shape: Shape) -> Callable[[], float]:
    """The training loop's own step on one fixed batch; returns the loss."""
    one_step = TrainingStep(trained, training_options(shape), 1)
    batch = StepBatch(tokens=shape.tokens(), stream_hash="", progress=None, wait_seconds=0.0)
    return lambda: one_step.run(batch, 0, votes=Votes()).totals.loss


def peer_model(shape: Shape, trained: TrainedModel) -> LlamaForCausalLM:
    """Transformers' Llama with the weights of a (split) model of ours; collective over its group."""
    llama = llama_like(ArgonneConfig(**shape.settings()))
    weights = gather_state_dict(trained.model)
    weights["lm_head.weight"] = weights["embed_tokens.weight"]
    llama.load_state_dict({llama_name(name): tensor for name, tensor in weights.items()})
    llama.tie_weights()
    return llama.train()


def split_peer(llama: LlamaForCausalLM, mesh: DeviceMesh, *, naive: bool = False) -> LlamaForCausalLM:
    """DTensor tensor parallelism in place."""
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for projection in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
        plan[f"model.layers.*.{projection}"] = ColwiseParallel()
    plan["model.layers.*.mlp.up_proj"] = ColwiseParallel()
    plan["model.layers.*.self_attn.o_proj"] = RowwiseParallel()
    plan["model.layers.*.mlp.down_proj"] = RowwiseParallel()
    if not naive:
        plan["model.layers.*.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Replicate()},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
        plan["model.layers.*.mlp"] = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
        )
    parallelize_module(llama, mesh, plan)
    llama.lm_head.weight = llama.model.embed_tokens.weight
    return llama


def peer_step(llama: LlamaForCausalLM, shape: Shape) -> Callable[[], float]:
    """Forward, loss, backward, clipping, fused AdamW; vocabulary-parallel loss where the model is split."""
    parameters = list(llama.parameters())
    split = [p for p in parameters if isinstance(p, DTensor)]
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    groups = [{"params": group} for group in (split, whole) if group]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    tokens = shape.tokens().long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def forward_backward() -> Tensor:
        logits = llama(input_ids=inputs, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        return loss

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        if split:
            with loss_parallel():
                loss = forward_backward()
        else:
            loss = forward_backward()
        clip_peer(split, whole)
        optimizer.step()
        value = loss.full_tensor() if isinstance(loss, DTensor) else loss
        return float(value.detach())

    return run


def clip_peer(split: Sequence[Tensor], whole: Sequence[Tensor]) -> None:
    """Clip by the global norm with torch's own functions, DTensors and plain tensors apart."""
    squares = []
    for group in (split, whole):
        if group:
            norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).square())
    total = torch.stack(squares).sum().sqrt()
    for group in (split, whole):
        if group:
            nn.utils.clip_grads_with_norm_(group, CLIP, total)
