"""What errors of torch mean to the user."""

import pytest
import torch

from argonne.errors import DeviceError
from argonne.ranks.faults import run_error_of
from argonne.ranks.launch import Environment


@pytest.mark.parametrize(("visible", "gpu"), [("", "3"), ("4,5,6,7", "7"), ("GPU-abc", "GPU-abc")])
def test_a_hardware_fault_is_one_line_with_rank_and_device(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpu: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    where = Environment.read(environ={"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"})
    fault = torch.AcceleratorError(
        "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might"
    )
    known = run_error_of(fault, lambda cause: pytest.fail(f"no peer's end: {cause}"), where)
    assert isinstance(known, DeviceError) and "\n" not in str(known)
    assert str(known).startswith(f"rank 11: GPU {gpu} of ") and "uncorrectable ECC error" in str(known)
    assert "resume" in str(known)
