"""The devices that ``--plan-device`` names. Standard library only."""

from argonne.errors import ConfigError

DEVICE_BYTES = {
    "A100-80GB": 80_000_000_000,
    "H100": 80_000_000_000,
    "H200": 141_000_000_000,
    "B200": 180_000_000_000,
}
"""Memory by the vendor's sheets, decimal; what a driver shows is a little more for the first three."""

PEAK_FLOPS = {"A100-80GB": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense 16-bit FLOP/s by the same sheets."""


def device_bytes(name: str) -> int:
    """Memory of a device by its name, or of one whose bytes are given. Raises ConfigError."""
    known = {device.lower(): size for device, size in DEVICE_BYTES.items()}
    if name.lower() in known:
        return known[name.lower()]
    if name.isascii() and name.isdigit() and int(name) > 0:
        return int(name)
    raise ConfigError(f"--plan-device {name}: give {', '.join(DEVICE_BYTES)}, or a number of bytes")
