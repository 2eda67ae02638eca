"""Chunks of rows: they cover a tensor once, and a local tensor's part is where the slice map says."""

import pytest
import torch

from argonne.checkpoint.rows import clip_rows, local_index, local_part, row_chunks
from argonne.testing.checkpoint_samples import filled_slices, sample_map, unsharded


@pytest.mark.parametrize("shape", [(10, 3), (1, 1000), (7,), (64, 2, 2)])
@pytest.mark.parametrize("chunk_bytes", [1, 12, 100, 1 << 20])
def test_chunks_cover_all_rows_once(shape: tuple[int, ...], chunk_bytes: int) -> None:
    chunks = row_chunks(shape, chunk_bytes)
    assert [row for first, last in chunks for row in range(first, last)] == list(range(shape[0]))
    row_bytes = 4 * torch.Size(shape[1:]).numel()
    assert all(last - first == 1 or (last - first) * row_bytes <= chunk_bytes for first, last in chunks)


def test_an_empty_tensor_has_no_chunk() -> None:
    assert row_chunks((0, 4)) == [] and row_chunks((0,)) == []


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_parts_of_all_ranks_make_the_whole(tp_size: int) -> None:
    slice_map = sample_map(tp_size)
    for name in slice_map.names:
        whole = torch.full(slice_map.shape(name), torch.nan)
        for rank in range(tp_size):
            local = filled_slices(slice_map, rank)[0][name]
            for first, last in row_chunks(whole.shape, 1000):
                for box, low, high in clip_rows(slice_map.owned(name, rank), first, last):
                    assert first <= low < high <= last
                    part = local_part(local, box, low, high)
                    assert torch.equal(part, local[local_index(box, low, high)])
                    whole[(slice(low, high), *box.unsharded_index[1:])] = part
        assert torch.equal(whole, unsharded(name, "param")), name
