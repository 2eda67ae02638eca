"""Copies of weights: one changed bit is seen and named, on every rank."""

import math

import pytest
import torch

from argonne.errors import PeerError
from argonne.ranks.replicas import apply_fsdp, local_parameters
from argonne.testing.distributed import run_ranks
from argonne.testing.models import small_model
from argonne.verification.replicas import check_replicas, checksum
from tests.verification.layouts import layout
from tp_shard import TensorParallelState, shard_tensor_parallel


def replica_rank(
    rank: int, world_size: int, tp_size: int, kind: str, name: str, culprit: int, row: int
) -> tuple[int, str]:
    """Parameters compared while all is well, and the error after one element changes on one rank."""
    parallel = layout(rank, world_size, tp_size, 2 if kind == "hsdp" else None)
    model = small_model(torch.float32, num_key_value_heads=2)
    shard_tensor_parallel(model, parallel.mesh)
    sharded = kind in ("fsdp", "hsdp")
    if sharded:
        apply_fsdp(model, model.blocks, parallel, torch.float32)
    state: TensorParallelState = model.tensor_parallel  # type: ignore[assignment]
    slice_map = state.slice_map.with_data_parallel(
        parallel.dp_size, sharded=sharded, shard_size=parallel.shard_size
    )
    weights = local_parameters(model)
    compared = check_replicas(weights, slice_map, parallel)
    if rank == culprit:
        flat = weights[name].view(-1)
        flat[row] = torch.nextafter(flat[row], torch.tensor(math.inf))
    try:
        check_replicas(weights, slice_map, parallel)
    except PeerError as error:
        return compared, str(error)
    return compared, ""


@pytest.mark.parametrize(
    ("tp_size", "kind", "name", "culprit", "compared"),
    [
        (
            4,
            "none",
            "blocks.1.post_norm.weight",
            2,
            5 + 4,
        ),  # 5 norms; k and v of 2 blocks, 2 heads on 4 ranks
        (4, "none", "blocks.0.attn.k_proj.weight", 3, 5 + 4),
        (2, "ddp", "blocks.0.mlp.down_proj.weight", 3, 20),
        (2, "fsdp", "norm.weight", 1, 5),
        (1, "hsdp", "blocks.0.mlp.down_proj.weight", 3, 20),
    ],
)
def test_a_changed_copy_is_named(tp_size: int, kind: str, name: str, culprit: int, compared: int) -> None:
    for count, message in run_ranks(replica_rank, 4, tp_size, kind, name, culprit, 3):
        assert count == compared
        assert message.startswith(f"{name} is no longer the same on all ranks")
        held_by_two = kind != "none" or "norm" not in name
        assert f"rank {culprit} differs from rank" in message
        assert ("1 of 2 copies" if held_by_two else "1 of 4 copies") in message


def test_a_slice_that_only_one_rank_holds_is_not_compared() -> None:
    results = run_ranks(replica_rank, 4, 4, "none", "blocks.0.mlp.down_proj.weight", 1, 0)
    assert all(message == "" for _, message in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_bits_and_places(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argonne.verification.replicas._CHUNK_ELEMENTS", 16)
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(checksum(values), checksum(values.clone()))
    changed = values.clone()
    changed[6, 8] = torch.nextafter(changed[6, 8].float(), torch.tensor(9.0)).to(dtype) + 0.01
    swapped = values.clone().view(-1)
    swapped[[1, 40]] = swapped[[40, 1]]
    sums = {int(checksum(tensor)) for tensor in (values, changed, swapped, values.t())}
    assert len(sums) == 4
    assert int(checksum(values[:0])) == 0
