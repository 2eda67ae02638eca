"""Devices of --plan-device by name, in any case, or by their bytes."""

import pytest

from argonne.config.devices import DEVICE_BYTES, PEAK_FLOPS, device_bytes
from argonne.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "size"),
    [("H100", 80e9), ("h200", 141e9), ("a100-80gb", 80e9), ("B200", 180e9), ("16000000000", 16e9), ("1", 1)],
)
def test_a_name_or_a_number_of_bytes(name: str, size: float) -> None:
    assert device_bytes(name) == size


@pytest.mark.parametrize("name", ["", "H300", "0", "-5", "1e9", "80GB", "1.5", "\u0663"])
def test_anything_else_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        device_bytes(name)
    assert str(caught.value) == (
        f"--plan-device {name}: give A100-80GB, H100, H200, B200, or a number of bytes"
    )


def test_each_device_has_both_figures() -> None:
    assert DEVICE_BYTES.keys() == PEAK_FLOPS.keys()
