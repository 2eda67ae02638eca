"""What errors of torch.distributed and CUDA mean to the user."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from argonne.errors import DeviceError, PeerError, RunError, first_line
from argonne.ranks.launch import Environment

_COLLECTIVE_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def run_error_of(
    error: RunError | RuntimeError,
    explain: Callable[[BaseException], RunError],
    environment: Environment | None = None,
) -> RunError | None:
    """What an error of torch means to the user: a peer's end (``explain`` names it), too little memory, or a
    fault of the GPU of ``environment``'s rank.

    None where it is a fault of this program, whose traceback must be seen.
    """
    if isinstance(error, PeerError) and isinstance(error.__cause__, RuntimeError):
        return explain(error)  # a connection broke: which rank went away is for explain to find out
    if isinstance(error, RunError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceError(
            f"out of GPU memory ({first_line(error)}): lower --batch-size or --block-size, or use "
            "--activation-checkpointing full, --sequence-parallel or more GPUs"
        )
    if isinstance(error, torch.AcceleratorError):
        return DeviceError(
            f"{_device(environment)} failed ({first_line(error).rstrip('.')}): check it with nvidia-smi -q "
            "and the kernel's log (Xid), take it or its host out, then resume; --debug shows the traceback"
        )
    if isinstance(error, dist.DistError) or any(word in str(error) for word in _COLLECTIVE_WORDS):
        return explain(error)
    return None


def _device(environment: Environment | None) -> str:
    """Rank, GPU and host, without a call to the GPU, which may not answer."""
    host = socket.gethostname()
    if environment is None:
        return f"a GPU of {host}"
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    local = environment.local_rank
    if len(visible) == 1:
        gpu = visible[0]
    else:
        gpu = visible[local] if local < len(visible) else str(local)
    return f"rank {environment.rank}: GPU {gpu} of {host}"


def cannot_join(environment: Environment, error: Exception) -> DeviceError:
    """What an error of torch's rendezvous means to the user."""
    first = first_line(error).rstrip(".")
    return DeviceError(
        f"rank {environment.rank} of {environment.world_size} cannot join the others at "
        f"{environment.master} (MASTER_ADDR:MASTER_PORT): {first}; check that the endpoint is reachable, "
        f"that its port is free on rank 0's node and that all {environment.world_size} ranks were started"
    )
