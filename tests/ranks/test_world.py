"""The device of a process, and the tensor-parallel degree of a world."""

import pytest
import torch

from argonne.errors import ConfigError, DeviceError
from argonne.ranks.launch import Environment
from argonne.ranks.world import choose_device, default_tp_size, resolve_tp_size


def test_default_degree_is_the_largest_that_fits_a_node() -> None:
    assert default_tp_size(8, 24, 8) == 8
    assert default_tp_size(6, 24, 8) == 2
    assert default_tp_size(3, 24, 8) == 1
    assert default_tp_size(6, 6, 2) == 6


def test_degree_that_does_not_divide_the_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 6 processes started; use 1 or 2"):
        resolve_tp_size(4, world_size=6, local_world_size=6, query_heads=8, key_value_heads=4)


def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One visible GPU each is taken whatever the local rank; too few GPUs are named."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, {"RANK": "3"}.get(name, "4"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    environment = Environment.read()
    for count, index in ((8, 3), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert choose_device(environment) == torch.device("cuda", index)
    assert taken == [3, 0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"local rank 3 has no GPU: 2 are visible"):
        choose_device(environment)
