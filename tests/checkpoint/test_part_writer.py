"""Combined checksums are zlib's of the whole."""

import random
import zlib

import pytest

from argonne.checkpoint.part_writer import crc32_combine


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (1, 1), (3, 4097), (99_999, 65_536), (7, 9999)])
def test_the_checksum_of_two_parts(sizes: tuple[int, int]) -> None:
    first, second = (random.Random(size).randbytes(size) for size in sizes)
    combined = crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


def test_parts_beyond_four_gigabytes() -> None:
    """Zero bytes doubled again and again: the CRC of 2^33 of them and a tail, without reading them."""
    crc, size = zlib.crc32(bytes(1 << 20)), 1 << 20
    while size < 1 << 33:
        crc, size = crc32_combine(crc, crc, size), size * 2
    step = zlib.crc32(bytes(1 << 20))
    by_steps = step
    for _ in range((1 << 13) - 1):
        by_steps = crc32_combine(by_steps, step, 1 << 20)
    assert crc == by_steps
