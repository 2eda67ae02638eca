"""The bytes that arrive are the bytes appended, whatever the disk takes and however it takes it."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from argonne.checkpoint import streamed_file
from argonne.checkpoint.streamed_file import StreamedFile

SIZES = [0, 1, 4095, 4096, 4097, 12_288, 40_960, 100_001]


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _append_all(path: Path, data: bytes, cuts: random.Random) -> int:
    """Append ``data`` in pieces from memory that is overwritten at once; the position at the end."""
    with _new_file(path) as descriptor, StreamedFile(descriptor) as file:
        start = 0
        while start < len(data):
            piece = bytearray(data[start : start + cuts.randrange(1, 20_000)])
            file.append(memoryview(piece))
            start += len(piece)
            piece[:] = b"\xff" * len(piece)
        file.finish()
        return file.position


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_file, "BUFFER_BYTES", 8192)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_arrive_in_order(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert _append_all(tmp_path / "file", data, random.Random(1)) == size
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_file, "_set_direct", lambda descriptor, wanted: False)
    data = random.Random(2).randbytes(50_001)
    _append_all(tmp_path / "file", data, random.Random(3))
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("refused", [1, 2, 5])
def test_a_disk_that_refuses_direct_writes_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    write, calls, direct = os.write, [0], []

    def refusing(descriptor: int, data: Any) -> int:
        calls[0] += 1
        direct.append(streamed_file.is_direct(descriptor))
        if calls[0] == refused and direct[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refusing)
    data = random.Random(4).randbytes(60_003)
    _append_all(tmp_path / "file", data, random.Random(5))
    assert (tmp_path / "file").read_bytes() == data
    assert not any(direct[refused:]), "after one refusal all writes go the usual way"


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, rng = os.write, random.Random(6)
    monkeypatch.setattr(
        os, "write", lambda descriptor, data: write(descriptor, data[: rng.randrange(1, len(data) + 1)])
    )
    data = random.Random(7).randbytes(30_000)
    _append_all(tmp_path / "file", data, random.Random(8))
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("failing", [1, 3, 7])
def test_an_error_of_any_write_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write, calls = os.write, [0]

    def full(descriptor: int, data: Any) -> int:
        calls[0] += 1
        if calls[0] >= failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised:
        _append_all(tmp_path / "file", bytes(60_000), random.Random(9))
    assert raised.value.errno == errno.ENOSPC
    assert calls[0] == failing, "nothing is written behind a write that failed"


def test_this_disk_takes_direct_writes_or_says_no(tmp_path: Path) -> None:
    """Where the disk has O_DIRECT whole buffers go that way, and the file's end the usual way."""
    with _new_file(tmp_path / "file") as descriptor:
        file = StreamedFile(descriptor)
        was_direct = streamed_file.is_direct(descriptor)
        file.append(bytes(8192 * 3))
        file.append(b"end")
        file.finish()
        assert not was_direct or not streamed_file.is_direct(descriptor)
    assert (tmp_path / "file").stat().st_size == 8192 * 3 + 3
