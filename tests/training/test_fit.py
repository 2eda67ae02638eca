"""What a rank may take of its device or of its host, and the run that needs more."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config.presets import PRESETS
from argonne.config.run_options import PlanOptions
from argonne.errors import DeviceError
from argonne.testing.distributed import make_parallel
from argonne.training import fit
from argonne.training.fit import available_bytes, memory_of_a_rank, require_memory
from tests.training.small_run import run_config, training_options

SETTINGS = {**PRESETS["argonne-tiny"], "vocab_size": 1003}
RUNTIME = 400_000_000


def host(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(fit, "available_bytes", lambda: free)


@pytest.mark.parametrize(
    ("free", "ranks", "left"),
    [
        (10_000_000_000, 1, 9_600_000_000),
        (10_000_000_000, 4, 2_100_000_000),
        (RUNTIME, 2, 0),
        (None, 2, None),
    ],
)
def test_ranks_of_a_host_share_it_evenly(
    free: int | None, ranks: int, left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    host(monkeypatch, free)
    parallel = dataclasses.replace(make_parallel(0, 1, 1), local_world_size=ranks)
    assert memory_of_a_rank(parallel) == left


def test_a_gpu_is_its_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = dataclasses.replace(make_parallel(0, 1, 1), device=torch.device("cuda", 0), local_world_size=8)
    host(monkeypatch, 1)
    assert memory_of_a_rank(gpu) == 80_000_000_000


def test_the_run_that_needs_more_ends_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(Path(), training=training_options(block_size=64))
    parallel = make_parallel(0, 1, 1)
    host(monkeypatch, RUNTIME + 1_000_000)
    with pytest.raises(DeviceError, match=r"--ignore-plan") as caught:
        require_memory(config, SETTINGS, parallel)
    assert "\n" not in str(caught.value)
    for enough in (RUNTIME + 10_000_000_000, None):
        host(monkeypatch, enough)
        require_memory(config, SETTINGS, parallel)


def test_a_run_that_ignores_the_plan_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> int:
        raise AssertionError("asked for the memory")

    monkeypatch.setattr(fit, "memory_of_a_rank", asked)
    config = run_config(Path(), planning=PlanOptions(ignore_plan=True))
    require_memory(config, SETTINGS, make_parallel(0, 1, 1))


def test_the_kernel_says_kibibytes(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 90 kB\nMemFree: 3 kB\nMemAvailable:    7 kB\n", encoding="ascii")
    assert available_bytes(meminfo) == 7 * 1024
    meminfo.write_text("MemTotal: 90 kB\n", encoding="ascii")  # a kernel before 3.14
    assert available_bytes(meminfo) is None and available_bytes(tmp_path / "none") is None
