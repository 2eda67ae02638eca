"""What is done to each block of a model: recompute its activations, compile it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """torch.compile each block in place, with static shapes; parameter names do not change."""
    for block in blocks:
        block.compile(dynamic=False, backend=backend)


@contextlib.contextmanager
def uncompiled(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Blocks run as they are written: compiled ones would be compiled again, for other shapes and modes, and
    training would be slower for good."""
    if any(block._compiled_call_impl is not None for block in blocks):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
