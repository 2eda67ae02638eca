"""Split a model over the tensor-parallel group, in place: `shard_tensor_parallel`.

The model's own code stays free of distribution. The plan of its architecture (``argonne.tp.plan``) decides
how each layer is divided, the slice map (``argonne.tp.slices``) says which elements each rank holds, and the
parallel layers (``argonne.tp.layers``) take the place of the model's own.

All public names of the split can be imported from here.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from argonne.errors import ConfigError
from argonne.tp.architectures import has_plan, plan_for
from argonne.tp.calls import attach_call_hooks
from argonne.tp.chunked_loss import attach_head_loss
from argonne.tp.copied_gradients import CopiedGradients
from argonne.tp.costs import ModelOutline, SplitCost, sent_share
from argonne.tp.costs import tensor_parallel as tensor_parallel_cost
from argonne.tp.device_rates import DeviceRates, device_rates
from argonne.tp.distillation_loss import DistillationRule, TeacherLogits, vocabulary_slice
from argonne.tp.dropout import attach_dropout
from argonne.tp.entrances import attach_entrances
from argonne.tp.group import ProcessTPGroup, SimulatedTPGroup, TPGroup, as_tp_group
from argonne.tp.imbalance import head_imbalance, work_imbalance
from argonne.tp.initial_values import initialise_parameters
from argonne.tp.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from argonne.tp.loss import attach_loss, vocab_parallel_cross_entropy
from argonne.tp.padded_heads import attach_padded_heads, padding_text
from argonne.tp.plan import (
    HeadCounts,
    TensorParallelPlan,
    build_slice_map,
    check_degree,
    fitting_degrees,
    summed_parameters,
)
from argonne.tp.plan_memory import OUTSIDE_BYTES, Layout, LayoutSizes, RankMemory, rank_memory
from argonne.tp.plan_time import StepPrediction, StepTime
from argonne.tp.precision import DTYPES
from argonne.tp.regions import (
    SequenceState,
    copy_to_region,
    gather_from_region,
    gather_sequence,
    reduce_from_region,
    reduce_scatter_sequence,
    scatter_to_region,
    split_sequence,
)
from argonne.tp.saving import guard_saving
from argonne.tp.shape_only import shape_only
from argonne.tp.slices import SliceMap
from argonne.tp.state import (
    TensorParallelState,
    gather_state_dict,
    gather_unsharded,
    take_slice,
    unsharded_state_dict,
)
from argonne.tp.stored_targets import StoredTargets
from argonne.tp.swap import rewrite_head_counts, swap_layers
from argonne.tp.uneven_heads import attach_head_copies

__all__ = [
    "DTYPES",
    "OUTSIDE_BYTES",
    "ColumnParallelLinear",
    "DeviceRates",
    "DistillationRule",
    "HeadCounts",
    "Layout",
    "LayoutSizes",
    "ModelOutline",
    "ProcessTPGroup",
    "RankMemory",
    "RowParallelLinear",
    "SimulatedTPGroup",
    "SliceMap",
    "SplitCost",
    "StepPrediction",
    "StepTime",
    "StoredTargets",
    "TPGroup",
    "TeacherLogits",
    "TensorParallelModel",
    "TensorParallelState",
    "VocabParallelEmbedding",
    "as_tp_group",
    "build_slice_map",
    "check_degree",
    "copy_to_region",
    "device_rates",
    "fitting_degrees",
    "gather_from_region",
    "gather_sequence",
    "gather_state_dict",
    "gather_unsharded",
    "has_plan",
    "head_imbalance",
    "initialise_parameters",
    "padding_text",
    "rank_memory",
    "reduce_from_region",
    "reduce_scatter_sequence",
    "scatter_to_region",
    "sent_share",
    "shape_only",
    "shard_tensor_parallel",
    "split_sequence",
    "take_slice",
    "tensor_parallel_cost",
    "unsharded_state_dict",
    "vocab_parallel_cross_entropy",
    "vocabulary_slice",
    "work_imbalance",
]


def shard_tensor_parallel(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | TPGroup | None = None,
    *,
    sequence_parallel: bool = False,
    loss_chunk_tokens: int | None = 0,
    pad_to: int = 1,
    plan: TensorParallelPlan | None = None,
) -> nn.Module:
    """Split ``model`` in place over a tensor-parallel group and return it.

    The model may hold weights (every rank the same: each keeps its slice) or lie on the meta device (the
    slices do too, and are materialised and filled afterwards). Parameter names do not change. A forward
    pass with ``labels`` or ``shift_labels`` computes the loss on vocabulary slices and returns the local
    logits (batch, seq_len, local_vocab_size); without them the logits are gathered. Dropout draws one mask
    on replicated activations, whatever the ranks' seeds, and different ones on divided heads.
    ``save_pretrained`` refuses to write slices.

    After the backward passes of a step call ``model.tensor_parallel.sum_partial_gradients``, which does
    nothing unless heads are shared, norms lie on local heads, or ``sequence_parallel`` is on.

    Args:
        model: an ArgonneModel, or transformers' Llama, Mistral, Qwen2, Qwen3 or GPT-2 with a language head.
        mesh: a DeviceMesh with a dimension "tp" (or of one dimension), a process group, or a group object.
        sequence_parallel: keep norms and the residual stream as slices of the sequence.
        loss_chunk_tokens: with ``shift_labels`` an ArgonneModel takes head and loss together, so many tokens
            at a time (None: 256 MiB of logits), and returns no logits; 0: all at once.
        pad_to: an ArgonneModel's heads, and slices of MLP and vocabulary, are stored with zeros up to a
            multiple of this, for kernels that want rows aligned; nothing else sees them.
        plan: replaces the plan of the model's type.

    Raises:
        ConfigError: an unknown architecture, what it or its heads do not allow, or a model divided before.
    """
    group = as_tp_group(mesh)
    plan = _fitting_plan(model, plan, sequence_parallel=sequence_parallel, pad_to=pad_to)
    slice_map = build_slice_map(model, plan, group.size, pad_to)
    sequence, head_sequence = SequenceState(sequence_parallel and group.size > 1), SequenceState()
    _attach(model, plan, slice_map, group, (sequence, head_sequence), pad_to, loss_chunk_tokens)
    guard_saving(model, slice_map)
    model.tensor_parallel = TensorParallelState(  # type: ignore[assignment]
        group=group,
        slice_map=slice_map,
        sequence=sequence,
        plan=plan,
        pad_to=pad_to,
        summed=summed_parameters(model, plan, sequence_parallel=sequence_parallel) if group.size > 1 else (),
        **_holders_of_copies(slice_map, group),
    )
    return model


def _holders_of_copies(slice_map: SliceMap, group: TPGroup) -> dict[str, Any]:
    """Who completes the gradients of copied heads: one subgroup, or where heads lie unevenly, an exchange."""
    if not slice_map.copied:
        return {"sharers": None}
    if slice_map.shares_evenly:
        return {"sharers": group.subgroup(slice_map.sharers)}
    return {"sharers": None, "copies": CopiedGradients(slice_map, group)}


def _attach(
    model: nn.Module,
    plan: TensorParallelPlan,
    slice_map: SliceMap,
    group: TPGroup,
    sequences: tuple[SequenceState, SequenceState],
    pad_to: int,
    loss_chunk_tokens: int | None,
) -> None:
    """Put the layers, loss and hooks of ``plan`` in place; ``sequences``: the body's, the head's."""
    sequence, head_sequence = sequences
    heads = HeadCounts.from_config(getattr(model, "config", None), pad_to)
    swap_layers(model, plan, slice_map, group, sequence, head_sequence)
    rewrite_head_counts(model, plan, group, heads)
    attach_padded_heads(model, plan, heads)
    attach_entrances(model, plan, group, sequence)
    attach_head_copies(model, plan, group, heads)
    attach_loss(model, plan, group)
    if loss_chunk_tokens != 0 and hasattr(model, "head_loss"):
        attach_head_loss(model, plan, group, head_sequence, loss_chunk_tokens)
    attach_call_hooks(model, plan, group, sequence, head_sequence)
    attach_dropout(model, plan, group)


def _fitting_plan(
    model: nn.Module, plan: TensorParallelPlan | None, *, sequence_parallel: bool, pad_to: int
) -> TensorParallelPlan:
    """The model's plan. ConfigError where it is divided, or its own code does not allow what is asked for."""
    _refuse_divided(model)
    plan = plan or plan_for(model)
    if sequence_parallel and not plan.sequence_parallel:
        raise ConfigError(f"--sequence-parallel does not work with {type(model).__name__}; leave it out")
    if pad_to < 1 or (pad_to > 1 and pad_to % 2):
        raise ConfigError(f"pad_to {pad_to}: give an even number, or 1 for no padding")
    if pad_to > 1 and not plan.padded_heads:
        raise ConfigError(f"the heads of {type(model).__name__} cannot be stored padded: leave pad_to out")
    return plan


def _refuse_divided(model: nn.Module) -> None:
    """ConfigError where a module of the model has been split, or its parameters are divided otherwise."""
    split = any(isinstance(getattr(m, "tensor_parallel", None), TensorParallelState) for m in model.modules())
    if split or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} is already divided over ranks: split a model that is whole, once"
        )


class TensorParallelModel(nn.Module):
    """A model and its split in one module, for use without the training script.

    ``TensorParallelModel(model, mesh)`` shards ``model`` in place (see `shard_tensor_parallel`) and calls
    it; ``self.model`` is the sharded model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh | dist.ProcessGroup | TPGroup | None = None,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.model = shard_tensor_parallel(model, mesh, sequence_parallel=sequence_parallel)

    @property
    def tensor_parallel(self) -> TensorParallelState:
        return self.model.tensor_parallel  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Every rank calls this with the same arguments and random state, and returns the same ids."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def sum_partial_gradients(self) -> None:
        """Complete the gradients of replicated parameters after the backward pass."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.tensor_parallel.sum_partial_gradients(gradients)

    def unsharded_state_dict(self) -> dict[str, Tensor]:
        """The whole weights on every rank, which the unsharded model loads strictly; collective."""
        return unsharded_state_dict(self.model)
