"""The archive: torch reads it, every damage is found, the bytes lie as they should."""

import os
import random
import zipfile
from pathlib import Path

import pytest
import torch

from argonne.checkpoint import archive as archive_module
from argonne.checkpoint.archive import (
    ALIGNMENT,
    ArchiveWriter,
    read_archive_index,
    tensor_bytes,
    verify_archive,
)
from argonne.checkpoint.contents import begin_archive, finish_archive
from argonne.checkpoint.safe_pickle import contiguous_ref
from argonne.checkpoint.tensor_file import TensorFile, read_rectangle
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import save_sample


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sample(tmp_path_factory.mktemp("saved"))[0]


def test_records_are_aligned_stored_and_checksummed(saved: Path) -> None:
    assert all(span.offset % ALIGNMENT == 0 for span in read_archive_index(saved).records.values())
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert "archive/data.pkl" in names and "archive/version" in names and "archive/byteorder" in names


def test_two_saves_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again, _ = save_sample(tmp_path)
    assert again.read_bytes() == saved.read_bytes()


def _flip(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def _outside(path: Path) -> list[int]:
    """Positions of all bytes that belong to no record: headers, padding, directory, end, comment."""
    positions: list[int] = []
    start = 0
    spans = sorted(read_archive_index(path).records.values(), key=lambda span: span.offset)
    for span in spans:
        positions += range(start, span.offset)
        start = span.offset + span.size
    return [*positions, *range(start, path.stat().st_size)]


def _assert_refused(path: Path, data: bytes, what: str) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        verify_checkpoint(path)
        pytest.fail(f"not noticed: {what}")


def test_random_flips_are_found(saved: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    data = saved.read_bytes()
    outside = _outside(saved)
    positions = [rng.randrange(len(data)) for _ in range(200)]
    positions += rng.sample(outside, 200) + list(range(len(data) - 150, len(data)))
    for position in positions:
        bit = rng.randrange(8)
        _assert_refused(tmp_path / "flipped.pth", _flip(data, position, bit), f"bit {bit} of byte {position}")


@pytest.mark.slow
def test_every_byte_outside_the_records_is_proven(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = random.Random(seed)
    for position in _outside(saved):
        _assert_refused(tmp_path / "flipped.pth", _flip(data, position, rng.randrange(8)), f"byte {position}")


def test_truncation_at_any_length_is_found(saved: Path, tmp_path: Path) -> None:
    rng = random.Random(6)
    data = saved.read_bytes()
    lengths = [0, 1, 2, 3, 4, 30, len(data) // 2, len(data) - 1]
    for length in lengths + [rng.randrange(len(data)) for _ in range(200)]:
        _assert_refused(tmp_path / "cut.pth", data[:length], f"cut to {length} bytes")
    _assert_refused(tmp_path / "long.pth", data + b"\0", "one byte too many")


def _write_large(path: Path, sizes: list[int]) -> None:
    """An archive of float32 tensors whose value i is i + 1, written in 64 MB pieces."""
    refs = {str(index): contiguous_ref(str(index), torch.float32, (n,)) for index, n in enumerate(sizes)}
    tree = {"model_state_dict": refs}
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    writer = ArchiveWriter(descriptor)
    try:
        begin_archive(writer, tree)
        for index, size in enumerate(sizes):
            writer.begin(f"data/{index}", 4 * size)
            for start in range(0, size, 1 << 24):
                count = min(1 << 24, size - start)
                writer.write(tensor_bytes(torch.full((count,), index + 1.0)))
        finish_archive(writer)
    finally:
        writer.abandon()
        os.close(descriptor)


def test_zip64_fields_below_their_real_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_ZIP64_LIMIT", 1000)
    path = tmp_path / "zip64.pth"
    _write_large(path, [10, 5000, 20])
    verify_archive(path)
    loaded = torch.load(path, weights_only=True, mmap=True)["model_state_dict"]
    assert [float(tensor[-1]) for tensor in loaded.values()] == [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_more_than_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "large.pth"
    _write_large(path, [1000, (1 << 30) + 4096, 1000])  # the second record alone exceeds 4 GB
    verify_archive(path)
    loaded = torch.load(path, weights_only=True, mmap=True)["model_state_dict"]
    assert [float(tensor[-1]) for tensor in loaded.values()] == [1.0, 2.0, 3.0]
    file = TensorFile(path)
    last = file.source(file.tree["model_state_dict"]["2"])
    assert read_rectangle(last, (998,), (2,)).tolist() == [3.0, 3.0]
