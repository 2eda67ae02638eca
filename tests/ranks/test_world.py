"""The device of a process, and the tensor-parallel degree of a world."""

import re

import pytest
import torch

from argonne.errors import ConfigError, DeviceError
from argonne.ranks.launch import Environment
from argonne.ranks.world import choose_device, default_tp_size, resolve_tp_size


def test_default_degree_is_the_largest_that_fits_a_node() -> None:
    assert default_tp_size(8, 24) == 8
    assert default_tp_size(7, 24) == 7
    assert default_tp_size(6, 24) == 6
    assert default_tp_size(3, 24) == 3
    assert default_tp_size(8, 6) == 4
    assert default_tp_size(6, 6) == 6
    assert default_tp_size(7, 6) == 1


def test_degree_that_does_not_divide_the_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 6 processes started; use 1, 2, 3 or 6"):
        resolve_tp_size(4, world_size=6, local_world_size=6, query_heads=8)


@pytest.mark.parametrize(
    ("requested", "processes", "text"),
    [
        (3, 4, "3 does not divide the 4 processes started; use 1, 2 or 4, or start a multiple of 3"),
        (5, 6, "5 does not divide the 6 processes started; use 1, 2, 3 or 6, or start a multiple of 5"),
        (32, 32, "32 leaves ranks without any of the 24 attention heads; use 1, 2, 4, 8 or 16"),
        (25, 25, "25 leaves ranks without any of the 24 attention heads; use 1 or 5"),
        (8, 12, "8 does not divide the 12 processes started; use 1, 2, 3, 4, 6 or 12, or start a multiple"),
        (24, 8, "24 does not divide the 8 processes started; use 1, 2, 4 or 8, or start a multiple of 24"),
    ],
)
def test_refused_degrees_name_those_that_fit_heads_and_processes(
    requested: int, processes: int, text: str
) -> None:
    heads = {"query_heads": 24}
    with pytest.raises(ConfigError) as refusal:
        resolve_tp_size(requested, world_size=processes, local_world_size=processes, **heads)
    assert f"--tensor-parallel-size {text}" in str(refusal.value)
    named = re.findall(r"\d+", str(refusal.value).partition("; use ")[2].partition(", or start")[0])
    for degree in map(int, named):
        assert resolve_tp_size(degree, world_size=processes, local_world_size=processes, **heads) == degree


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
