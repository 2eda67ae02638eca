"""What errors of torch.distributed and CUDA mean to the user."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from argonne.errors import CheckpointError, DeviceError, PeerError, RunError
from argonne.ranks.faults import cannot_join, run_error_of
from argonne.ranks.launch import Environment

EXPLAINED = PeerError("rank 1 died")


def meaning(error: RunError | RuntimeError) -> RunError | None:
    return run_error_of(error, lambda _: EXPLAINED)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711"),
        RuntimeError("NCCL communicator was aborted on rank 0"),
        RuntimeError("Connection reset by peer"),
        RuntimeError("writev: Broken pipe"),
        dist.DistBackendError("whatever it says"),
        dist.DistNetworkError("The client socket has failed to connect"),
    ],
)
def test_a_failed_collective_is_explained(error: RuntimeError) -> None:
    assert meaning(error) is EXPLAINED


def test_a_peers_end_that_came_of_a_broken_connection_is_explained_too() -> None:
    error = PeerError("the ranks cannot agree")
    assert meaning(error) is error
    error.__cause__ = RuntimeError("Connection closed by peer")
    assert meaning(error) is EXPLAINED
    other = CheckpointError("cut")
    other.__cause__ = RuntimeError("Connection closed by peer")
    assert meaning(other) is other


def test_too_little_memory_names_what_lowers_it() -> None:
    found = meaning(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nException raised from malloc"))
    assert isinstance(found, DeviceError)
    assert str(found).startswith("out of GPU memory (CUDA out of memory. Tried 2 GiB.): lower --batch-size")
    assert "\n" not in str(found) and "--activation-checkpointing full" in str(found)


@pytest.mark.parametrize(
    "said", ["mat1 and mat2 shapes cannot be multiplied", "", "expected scalar type Float"]
)
def test_a_fault_of_this_program_keeps_its_traceback(said: str) -> None:
    assert meaning(RuntimeError(said)) is None


def test_a_rendezvous_that_fails_names_rank_and_endpoint() -> None:
    environment = replace(Environment.read(environ={}), rank=3, world_size=4, master="10.0.0.1:29500")
    found = cannot_join(environment, RuntimeError("Timed out after 30 seconds.\nstack of C++"))
    assert str(found).startswith(
        "rank 3 of 4 cannot join the others at 10.0.0.1:29500 (MASTER_ADDR:MASTER_PORT): "
        "Timed out after 30 seconds; check that"
    )
    assert "\n" not in str(found) and str(found).endswith("that all 4 ranks were started")
