"""Split a model over the tensor-parallel group: swap its layers, rewrite its head counts, tie its ends.

`shard_tensor_parallel` changes a plain Hugging Face model in place. The model's own code stays free of
distribution; what it becomes is decided by the plan (``tp_plan``), laid out by the slice map
(``tp_slices``) and carried out by the layers (``tp_layers``).

The public names of the split are all importable from here.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from argonne.errors import ConfigError
from argonne.tp.architectures import plan_for
from argonne.tp.fused import ColumnGroup, GatedExit
from argonne.tp.group import ProcessTPGroup, SimulatedTPGroup, TPGroup
from argonne.tp.initial_values import initialise_parameters
from argonne.tp.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from argonne.tp.loss import IGNORE_INDEX, vocab_parallel_cross_entropy
from argonne.tp.plan import (
    HeadCounts,
    Rule,
    Style,
    TensorParallelPlan,
    build_slice_map,
    check_degree,
    fitting_degrees,
    stores_transposed,
    summed_parameters,
)
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
from argonne.tp.slices import SliceMap
from argonne.tp.state import TensorParallelState, gather_state_dict, gather_unsharded, take_slice

__all__ = [
    "DTYPES",
    "ColumnParallelLinear",
    "ProcessTPGroup",
    "RowParallelLinear",
    "SimulatedTPGroup",
    "SliceMap",
    "TPGroup",
    "TensorParallelModel",
    "TensorParallelState",
    "VocabParallelEmbedding",
    "as_tp_group",
    "check_degree",
    "copy_to_region",
    "fitting_degrees",
    "gather_from_region",
    "gather_sequence",
    "gather_state_dict",
    "gather_unsharded",
    "initialise_parameters",
    "reduce_from_region",
    "reduce_scatter_sequence",
    "scatter_to_region",
    "shard_tensor_parallel",
    "split_sequence",
    "take_slice",
    "vocab_parallel_cross_entropy",
]


def as_tp_group(mesh: DeviceMesh | dist.ProcessGroup | TPGroup | None) -> TPGroup:
    """The group object of a mesh (its dimension "tp", or its only one), a process group, or the world."""
    if isinstance(mesh, TPGroup):
        return mesh
    if isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names or ()
        return ProcessTPGroup(mesh.get_group("tp") if "tp" in names else mesh.get_group())
    if mesh is None:
        world = dist.group.WORLD
        return TPGroup(0, 1) if world is None else ProcessTPGroup(world)
    return ProcessTPGroup(mesh)


def shard_tensor_parallel(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | TPGroup | None = None,
    *,
    sequence_parallel: bool = False,
    plan: TensorParallelPlan | None = None,
) -> nn.Module:
    """Split ``model`` in place over a tensor-parallel group and return it.

    The model may hold weights (every rank the same: each keeps its slice) or lie on the meta device (the
    slices do too, and are materialised and filled afterwards). Parameter names do not change. A forward
    pass with ``labels`` or ``shift_labels`` computes the loss on vocabulary slices and returns the local
    logits (batch, seq_len, local_vocab_size); without them the logits are gathered.

    After each backward pass of a step (once, with gradient accumulation) call
    ``model.tensor_parallel.sum_partial_gradients``, which does nothing unless heads are shared, norms lie
    on local heads, or ``sequence_parallel`` is on.

    Args:
        model: an ArgonneModel, or transformers' Llama, Mistral, Qwen2, Qwen3 or GPT-2 with a language head.
        mesh: a DeviceMesh with a dimension "tp" (or of one dimension), a process group, or a group object.
        sequence_parallel: keep norms and the residual stream as slices of the sequence.
        plan: replaces the plan of the model's type.

    Raises:
        ConfigError: unknown architecture, or a degree that does not fit the heads.
    """
    group = as_tp_group(mesh)
    plan = plan or plan_for(model)
    if sequence_parallel and not plan.sequence_parallel:
        raise ConfigError(f"--sequence-parallel does not work with {type(model).__name__}; leave it out")
    slice_map = build_slice_map(model, plan, group.size)
    summed = summed_parameters(model, plan, sequence_parallel=sequence_parallel)
    tied = _parameter(model, plan.head) is _parameter(model, plan.embedding)
    sequence = SequenceState(enabled=sequence_parallel and group.size > 1)
    head_sequence = SequenceState()

    swaps = [(name, module, rule) for name, module in model.named_modules() if (rule := plan.rule_for(name))]
    for name, module, rule in swaps:
        on = head_sequence if name == plan.head else sequence
        replacement = _parallel_layer(name, module, rule, plan, slice_map, group, on)
        if replacement is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacement)
    if tied:
        model.get_submodule(plan.head).weight = model.get_submodule(plan.embedding).weight

    _rewrite_head_counts(model, plan, group.size)
    _open_regions(model, plan, group, sequence)
    _attach_loss(model, plan, group)
    _attach_entrance(model, plan, group, sequence, head_sequence)
    sharers = max((cut.sharers for name in slice_map.names if (cut := slice_map.cut(name))), default=1)
    model.tensor_parallel = TensorParallelState(  # type: ignore[assignment]
        group=group,
        slice_map=slice_map,
        sequence=sequence,
        plan=plan,
        summed=summed if group.size > 1 else (),
        sharers=group.subgroup(sharers) if sharers > 1 else None,
    )
    return model


def _parameter(model: nn.Module, module_name: str) -> nn.Parameter:
    weight = model.get_submodule(module_name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _parallel_layer(
    name: str,
    module: nn.Module,
    rule: Rule,
    plan: TensorParallelPlan,
    slice_map: SliceMap,
    group: TPGroup,
    sequence: SequenceState,
) -> nn.Module | None:
    """The layer that takes the place of ``module``, holding its slices; None for what stays whole."""
    if rule.style not in (Style.COLUMN, Style.ROW, Style.VOCABULARY):
        return None
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    bias = getattr(module, "bias", None)
    known = f"{name}.weight" if f"{name}.weight" in slice_map.names else f"{plan.embedding}.weight"
    local = slice_map.tp_local_shape(known, group.rank)
    transposed = stores_transposed(module)
    placed: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    layer: nn.Module
    if isinstance(module, nn.Embedding):
        entrance = sequence if plan.embedding_splits_sequence else None
        layer = VocabParallelEmbedding(
            *weight.shape, group=group, padding_idx=module.padding_idx, sequence=entrance, **placed
        )
    else:
        out_features, in_features = reversed(weight.shape) if transposed else weight.shape
        local_out, local_in = reversed(local) if transposed else local
        if rule.style is Style.ROW:
            layer = RowParallelLinear(
                in_features, out_features, bias is not None, group=group, sequence=sequence,
                local_in_features=local_in, transposed=transposed, **placed,
            )  # fmt: skip
        else:
            layer = ColumnParallelLinear(
                in_features, out_features, bias is not None, group=group, sequence=sequence,
                enter_region=name == plan.head, local_out_features=local_out, transposed=transposed, **placed,
            )  # fmt: skip
    for leaf, parameter in module.named_parameters(recurse=False):
        full_name = f"{name}.{leaf}" if f"{name}.{leaf}" in slice_map.names else known
        if parameter.is_meta:
            getattr(layer, leaf).requires_grad_(parameter.requires_grad)
        else:
            part = take_slice(parameter.detach(), slice_map, full_name, group.rank)
            setattr(layer, leaf, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return layer.train(module.training)


def _matching(model: nn.Module, pattern: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]


def _rewrite_head_counts(model: nn.Module, plan: TensorParallelPlan, tp_size: int) -> None:
    local = HeadCounts.from_config(getattr(model, "config", None)).local(tp_size)
    for attention in _matching(model, plan.attention):
        for attribute, quantity in plan.head_attributes:
            if not hasattr(attention, attribute):
                raise AttributeError(
                    f"{type(attention).__name__} has no {attribute}, which the plan rewrites"
                )
            setattr(attention, attribute, local[quantity])


def _open_regions(
    model: nn.Module, plan: TensorParallelPlan, group: TPGroup, sequence: SequenceState
) -> None:
    """Put the one entrance of each attention and MLP block in place, and the gated exits."""
    if plan.gated_exit is not None:
        for module in _matching(model, plan.gated_exit.pattern):
            layer = getattr(module, plan.gated_exit.members[0])
            plain = getattr(module, plan.gated_exit.method)
            setattr(module, plan.gated_exit.method, GatedExit(layer, plain))
    if group.size == 1:
        return
    for seam in plan.seams:
        for module in _matching(model, seam.pattern):
            members = [getattr(module, member) for member in seam.members]
            setattr(module, seam.method, ColumnGroup(members, group, sequence))
    if not plan.seams:

        def enter(hidden_states: Tensor) -> Tensor:
            if sequence.enabled:
                return gather_sequence(hidden_states, group, sequence.seq_len)
            return copy_to_region(hidden_states, group)

        for pattern in (plan.attention, plan.mlp):
            for module in _matching(model, pattern):
                _transform_input(module, enter)
    if sequence.enabled and not plan.embedding_splits_sequence:
        _transform_input(model.get_submodule(plan.first_block), lambda hidden: split_sequence(hidden, group))


def _transform_input(module: nn.Module, transform: Callable[[Tensor], Tensor]) -> None:
    """Apply ``transform`` to the hidden states a module is called with, by position or by keyword."""

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (transform(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": transform(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _attach_loss(
    model: nn.Module,
    plan: TensorParallelPlan,
    group: TPGroup,
) -> None:
    """Loss on vocabulary slices, at size 1 too, for its memory."""
    vocab_size = model.get_submodule(plan.embedding).num_embeddings
    assert isinstance(vocab_size, int)

    def loss_function(
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int = vocab_size,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        logit_softcap: float = 0.0,
        z_loss_weight: float = 0.0,
        **_: Any,
    ) -> Tensor:
        """As transformers' causal language model loss: labels are shifted here, shift_labels already are."""
        if shift_labels is None:
            if labels is None:
                raise ValueError("a loss needs labels or shift_labels")
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = vocab_parallel_cross_entropy(
            logits,
            shift_labels,
            group,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            reduction=reduction,
            logit_softcap=logit_softcap,
            z_loss_weight=z_loss_weight,
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    model.loss_function = loss_function  # type: ignore[assignment]


def _attach_entrance(
    model: nn.Module,
    plan: TensorParallelPlan,
    group: TPGroup,
    sequence: SequenceState,
    head_sequence: SequenceState,
) -> None:
    """Tell the layers, at each call, how long the sequence is and whether a loss is wanted."""
    head = model.get_submodule(plan.head)
    assert isinstance(head, ColumnParallelLinear)
    signature = inspect.signature(model.forward)

    def enter_model(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**kwargs, **signature.bind_partial(*args, **kwargs).arguments}
        ids = given.get("input_ids")
        tokens = given.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            return  # the model itself says what is missing
        if sequence.enabled and ids is None and plan.embedding_splits_sequence:
            raise ValueError(
                "inputs_embeds do not go with sequence parallelism: the embedding splits the sequence; "
                "give input_ids"
            )
        sequence.seq_len = tokens.shape[1]
        wants_loss = given.get("labels") is not None or (
            # Transformers' own models take these along with labels only.
            "shift_labels" in signature.parameters and given.get("shift_labels") is not None
        )
        head.gather_output = not wants_loss
        # Positions can be picked (logits_to_keep) from the whole sequence only.
        picks = given.get("logits_to_keep", 0)
        picks = isinstance(picks, Tensor) or picks > 0
        head_sequence.enabled = sequence.enabled and wants_loss and not picks
        head_sequence.seq_len = sequence.seq_len

    def leave_norm(_: nn.Module, __: Any, hidden_states: Tensor) -> Tensor | None:
        if not sequence.enabled or head_sequence.enabled:
            return None
        # The head reduces the gradient at its own entrance.
        return gather_sequence(hidden_states, group, sequence.seq_len, partial=False)

    model.register_forward_pre_hook(enter_model, with_kwargs=True)
    if sequence.enabled:
        model.get_submodule(plan.final_norm).register_forward_hook(leave_norm)


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
        """The whole weights on every rank (a tied head is the embedding); collective."""
        return gather_state_dict(self.model)
