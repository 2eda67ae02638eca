"""Data parallelism over replicas: FSDP2 or DDP, gradient synchronization, local tensors.

Precision: parameters and Adam state are float32. With one replica, or with DDP, bf16 and fp16 mean
autocast. With FSDP2 they mean ``MixedPrecisionPolicy``: parameters are cast when they are gathered and
gradients are reduced in float32. In both the residual stream has the compute dtype, and softmax, norms
and cross entropy are float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from argonne.ranks.world import Parallel
from argonne.tp.copied_gradients import CopiedGradients
from argonne.tp.group import ProcessTPGroup
from argonne.tp.state import TensorParallelState


def apply_fsdp(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    parallel: Parallel,
    dtype: torch.dtype,
    *,
    reshard_after_forward: bool = True,
) -> None:
    """Shard each block, and the rest in the root, over the replicas, or within a node (``parallel.hybrid``).

    ``reshard_after_forward`` False: a block's gathered weights stay until its backward pass.
    """
    assert parallel.mesh is not None
    hybrid = parallel.hybrid
    mesh = parallel.mesh["dp"] if hybrid is None else hybrid.mesh
    policy = MixedPrecisionPolicy()
    if dtype is not torch.float32:
        # What enters a block is in the compute dtype already, but for the rotary tables, which stay float32.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    if state.copies is not None:  # two ranks' chunks of one head need not be on one replica
        # Of copies on other nodes FSDP2 has made the sum.
        group = dist.group.WORLD if hybrid is None else hybrid.node_group
        assert group is not None
        sharing = state.slice_map.with_data_parallel(parallel.shard_size, sharded=True)
        state.copies = CopiedGradients(sharing, ProcessTPGroup(group))


def apply_ddp(model: nn.Module, parallel: Parallel) -> nn.Module:
    """DistributedDataParallel over the data-parallel dimension; the returned wrapper is what is called."""
    assert parallel.mesh is not None
    return nn.parallel.DistributedDataParallel(
        model, process_group=parallel.mesh.get_group("dp"), gradient_as_bucket_view=True
    )


def let_go_of_gathered(model: nn.Module) -> None:
    """Free what FSDP2 keeps of weights after forward passes without backward pass: the root's, or all.

    They would also be old ones where weights are loaded or changed before the next pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_tensor(tensor: Tensor) -> Tensor:
    """The plain local part of a parameter or gradient that FSDP may hold as a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Local plain tensors by parameter name, sharing memory with the model's parameters."""
    return {name: local_tensor(parameter.detach()) for name, parameter in model.named_parameters()}


def local_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Local plain gradients by parameter name."""
    return {name: local_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def forward_context(parallel: Parallel, dtype: torch.dtype, *, sharded: bool) -> Callable[[], Any]:
    """A context manager for each forward pass: autocast, except in float32 and under FSDP's own policy."""
    if dtype is torch.float32 or sharded:
        return contextlib.nullcontext
    return partial(torch.autocast, parallel.device.type, dtype=dtype)


def gradient_sync(
    model: nn.Module, wrapped: nn.Module, *, last: bool
) -> contextlib.AbstractContextManager[None]:
    """Context of one micro-batch: data-parallel communication of gradients happens in the last only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()
