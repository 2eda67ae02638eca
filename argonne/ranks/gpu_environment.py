"""What CUDA, NCCL and PyTorch's allocator read from the environment, set in one place for every way to start.

Imported and called before torch, by every command that uses a GPU: CUDA reads its variables at the first
call, gloo and NCCL at the first group.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from argonne.ranks.launch import Environment

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The allocator's variable since torch 2.9, and the older name, which it still reads."""


def set_gpu_environment(environ: MutableMapping[str, str], *, one_queue: bool) -> None:
    """Set what the run wants and the user has not set; ``one_queue`` as in `one_queue_helps`.

    TORCH_NCCL_ASYNC_ERROR_HANDLING is left to torch: its default ends a process whose collective failed.
    """
    if not any(environ.get(name) for name in _ALLOCATOR):
        # Segments that grow fragment less when sequence lengths or recomputation change the sizes.
        environ[_ALLOCATOR[0]] = "expandable_segments:True"
    if one_queue:
        # Up to Hopper, one hardware queue starts kernels in the order of issue: a collective issued first
        # starts first and overlaps the product after it.
        environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    environ.setdefault("NCCL_DEBUG", "WARN")
    if interface := environ.get("NCCL_SOCKET_IFNAME"):
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def one_queue_helps(
    environment: Environment, tp_size: int | str | None, query_heads: int, *, fsdp: bool
) -> bool:
    """Whether tensor parallelism runs without FSDP2, whose gathers one queue keeps from overlapping.

    ``tp_size`` None: the largest that divides the ranks of a node and the heads. ``auto`` may leave replicas.
    """
    if isinstance(tp_size, str):
        return not fsdp
    if tp_size is None:
        ranks = environment.local_world_size or environment.world_size
        tp_size = max(size for size in range(1, ranks + 1) if ranks % size == 0 and query_heads % size == 0)
    return tp_size > 1 and (not fsdp or environment.world_size == tp_size)
