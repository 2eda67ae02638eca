"""What CUDA, NCCL and the allocator find in the environment, for every way to start."""

import pytest

from argonne.ranks.gpu_environment import one_queue_helps, set_gpu_environment
from argonne.ranks.launch import Environment


def one_queue_of(ranks: int, per_node: int | None, tp_size: int | None, heads: int, fsdp: bool) -> bool:
    variables = {"RANK": "0", "WORLD_SIZE": str(ranks)}
    if per_node is not None:
        variables["LOCAL_WORLD_SIZE"] = str(per_node)
    return one_queue_helps(Environment.read(environ=variables), tp_size, heads, fsdp=fsdp)


@pytest.mark.parametrize(
    ("ranks", "per_node", "tp_size", "heads", "fsdp", "expected"),
    [
        (8, 8, None, 24, True, True),  # tp 8, one replica
        (8, None, None, 24, True, True),  # started by hand
        (16, 8, None, 24, True, False),  # FSDP2 over two nodes
        (16, 8, None, 24, False, True),  # DDP
        (8, 8, 4, 24, True, False),
        (8, 8, 1, 24, True, False),
        (8, 8, 1, 24, False, False),
        (8, 8, None, 6, True, False),  # tp 2 x dp 4
        (8, 8, None, 16, True, True),
        (1, 1, None, 24, True, False),
    ],
)
def test_one_queue_only_under_tensor_parallelism_without_fsdp2(
    ranks: int, per_node: int | None, tp_size: int | None, heads: int, fsdp: bool, expected: bool
) -> None:
    one_queue = one_queue_of(ranks, per_node, tp_size, heads, fsdp)
    assert one_queue is expected
    environ: dict[str, str] = {}
    set_gpu_environment(environ, one_queue=one_queue)
    assert environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == ("1" if expected else None)


def test_torchs_own_error_handling_and_segments_that_grow() -> None:
    environ: dict[str, str] = {}
    set_gpu_environment(environ, one_queue=True)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in environ
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True" and environ["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_set_is_kept(name: str) -> None:
    mine = {
        name: "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "eth7",
    }  # fmt: skip
    environ = dict(mine)
    set_gpu_environment(environ, one_queue=True)
    assert environ == {**mine, "GLOO_SOCKET_IFNAME": "eth7"}
