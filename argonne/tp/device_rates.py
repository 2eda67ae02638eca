"""Rates that the plan assumes of devices: one table, each figure with its source; nothing was timed."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What a prediction of a step rests on.

    Assumed of an H100: 700 TFLOP/s of products (71 % of the sheet's 989), 2.8 TB/s of memory (84 % of 3.35),
    370 GB/s sent over NVLink (82 % of 450 each way). The others are assumed to reach the same shares of their
    sheets.
    """

    products: float
    """FLOP/s of dense 16-bit products."""
    attention: float
    """FLOP/s of fused causal attention, forward and backward, in the kernel's padded head_dim."""
    memory: float
    """Bytes a second that elementwise kernels read and write."""
    link: float
    """Bytes a second that a GPU sends within a node."""
    network: float = 50e9
    """Bytes a second that a GPU sends between nodes; assumed: one 400 Gbit/s adapter for each."""


RATES = {
    # Sheet: 312 TFLOP/s, 2.04 TB/s, 300 GB/s each way. Attention: FlashAttention-2 (Dao 2023, section 4.1)
    # reaches 63 to 73 % of the peak on this one at head_dim 128; assumed 55 % at larger ones.
    "A100-80GB": DeviceRates(products=221e12, attention=170e12, memory=1.7e12, link=247e9),
    # Attention: assumed, a quarter of the peak (head_dim 170 takes FlashAttention-2, not made for Hopper).
    "H100": DeviceRates(products=700e12, attention=250e12, memory=2.8e12, link=370e9),
    # Sheet: as the H100, with 4.8 TB/s.
    "H200": DeviceRates(products=700e12, attention=250e12, memory=4.0e12, link=370e9),
    # Sheet: 2250 TFLOP/s, 8 TB/s, 900 GB/s each way. Attention: assumed.
    "B200": DeviceRates(products=1590e12, attention=400e12, memory=6.7e12, link=740e9),
}
DEFAULT = "H100"
"""Of a device that is known by its bytes only, and of a CPU, where the rates only order the layouts."""


def known_device(name: str) -> str | None:
    """The table's name of a device, also by one that a driver tells, such as ``NVIDIA A100-SXM4-80GB``."""
    words = set(re.split(r"[\s\-_]+", name.upper()))
    return next((device for device in RATES if device.partition("-")[0] in words), None)


def device_rates(name: str) -> DeviceRates:
    """Of a device by any of its names; those of ``DEFAULT`` where it is not known."""
    return RATES[known_device(name) or DEFAULT]
