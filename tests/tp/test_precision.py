"""The compute dtype of the split's own autograd functions is the one autocast gives torch's products."""

import pytest
import torch
import torch.nn.functional as F

from argonne.tp.precision import DTYPES, autocast_dtype, in_compute_dtype


@pytest.mark.parametrize("operand", list(DTYPES.values()))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_operands_are_cast_as_torchs_linear_casts_them(
    operand: torch.dtype, autocast: torch.dtype | None
) -> None:
    x, weight = torch.ones(2, 3, dtype=operand), torch.ones(4, 3, dtype=operand)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        expected = F.linear(x, weight).dtype
        first, second, absent = in_compute_dtype(x, weight, None)
    assert first is not None and second is not None and absent is None
    assert first.dtype == second.dtype == expected


def test_float64_is_left_alone() -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(x) is None
        assert in_compute_dtype(x)[0] is x
