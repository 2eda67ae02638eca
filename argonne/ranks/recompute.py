"""What is done to each block of a model: recompute its activations, compile it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from argonne.errors import ConfigError, DeviceError
from argonne.ranks.world import Parallel
from argonne.tp.fused import GatedExit


def recompute_blocks(blocks: Iterable[nn.Module], mode: str) -> None:
    """Recompute each block's activations in the backward pass.

    ``full`` keeps a block's input only and runs its forward pass again, collectives included.
    ``selective`` keeps the outputs of matrix products and collectives and recomputes the rest (attention,
    norms, the SwiGLU product), so that no collective runs twice.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = _selective_contexts
    for block in blocks:
        for module in block.modules():
            for method in vars(module).values():
                if isinstance(method, GatedExit):
                    method.keep_product = True
        block.forward = _recomputed(block.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A plain function: torch.compile does not look into a functools.partial.
    def recomputed_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed_forward


def _selective_contexts() -> Any:
    # The reduction overwrites the partial product it is given: one kept tensor serves as both.
    return create_selective_checkpoint_contexts(_keep_products, allow_cache_entry_mutation=True)


def _keep_products(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    aten = torch.ops.aten
    kept = (aten.mm.default, aten.addmm.default, aten.linear.default)
    if op in kept or op.namespace in ("_c10d_functional", "mkldnn"):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}
"""Inductor's options that start a collective as soon, and await it as late, as the data allow.

Left alone, it orders a graph by peak memory and awaits each reduction at once, so that the weight gradients,
which the layers put between the two, hide nothing."""


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str = "inductor", async_tp: bool = False) -> None:
    """torch.compile each block in place, with static shapes; parameter names do not change.

    ``async_tp``: torch's own asynchronous tensor parallelism (see `enable_async_tp`).
    """
    options: dict[str, Any] | None = None
    if backend == "inductor":
        known = set(torch._inductor.list_options())  # a version outside the tested range may lack one
        options = {name: value for name, value in OVERLAP.items() if name in known}
        if async_tp:
            options["_micro_pipeline_tp"] = True
    for block in blocks:
        block.compile(dynamic=False, backend=backend, options=options)


def enable_async_tp(parallel: Parallel, block_size: int) -> None:
    """Let the GPUs of this replica read each other's buffers, as ``async_tp`` wants; collective.

    Compiled with it, a product and its gather or scatter become one operation that works piece by piece:
    while one piece is on its way, another is multiplied (torch's ``fused_all_gather_matmul`` and
    ``fused_matmul_reduce_scatter``). On a CPU the collectives stay as they are.

    Raises ConfigError where the sequence is not divided evenly (padding is in the way), DeviceError where the
    GPUs cannot reach each other's memory.
    """
    if parallel.tp_size == 1:
        return
    if block_size % parallel.tp_size:
        raise ConfigError(
            f"--async-tp: --block-size {block_size} is not a multiple of the tensor-parallel degree "
            f"{parallel.tp_size}: change one of them, or leave --async-tp out"
        )
    if parallel.device.type != "cuda":
        return
    if parallel.local_world_size % parallel.tp_size:
        raise DeviceError(
            f"--async-tp: the {parallel.tp_size} ranks of a replica lie on several hosts: use a "
            "--tensor-parallel-size that divides the ranks of a host, or leave --async-tp out"
        )
    from torch.distributed import _symmetric_memory as symmetric_memory

    assert parallel.tp_group is not None
    name = parallel.tp_group.group_name
    try:
        with warnings.catch_warnings():
            # Said to be needless since torch 2.13, whose pass still asks for it.
            warnings.simplefilter("ignore", FutureWarning)
            symmetric_memory.enable_symm_mem_for_group(name)
        symmetric_memory.get_symm_mem_workspace(name, 1 << 20)
    except RuntimeError as error:
        raise DeviceError(
            f"--async-tp: the GPUs of rank {parallel.rank}'s replica cannot map each other's memory "
            f"({str(error).splitlines()[0]}): leave --async-tp out, or start on GPUs joined by NVLink"
        ) from error


@contextlib.contextmanager
def uncompiled(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Blocks run as they are written: compiled ones would be compiled again, for other shapes and modes, and
    training would be slower for good."""
    if any(block._compiled_call_impl is not None for block in blocks):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
