"""CRC-32 of bytes whose parts were read by different processes.

A CRC is a polynomial over GF(2) modulo that of CRC-32, so appending n zero bytes multiplies by x^(8n); the
CRC of A followed by B is crc(A) * x^(8 |B|) + crc(B) (as zlib's own crc32_combine, which Python lacks).
"""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320
"""Of CRC-32, lowest power in the highest bit."""
_ONE = 1 << 31


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    result = 0
    while a:
        if a & _ONE:
            result ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return result


def _power_of_x(exponent: int) -> int:
    """x^exponent modulo the polynomial."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result


def crc32_combine(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of A followed by B, from those of A and B and the bytes of B."""
    return _product(first, _power_of_x(8 * second_size)) ^ second
