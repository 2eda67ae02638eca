"""One value that is not finite is found, wherever it stands and in every dtype that is saved."""

import math

import pytest
import torch

from argonne.checkpoint.finite import all_finite, require_finite
from argonne.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_is_found_at_any_place(dtype: torch.dtype, value: float) -> None:
    values = torch.linspace(-9, 9, 77, dtype=torch.float64).to(dtype).reshape(7, 11)
    assert all_finite(values)
    for place in (0, 38, 76):
        spoiled = values.clone()
        spoiled.view(-1)[place] = value
        assert not all_finite(spoiled)
        with pytest.raises(CheckpointError, match=r"^exp_avg of x holds NaN or infinite"):
            require_finite(spoiled, "exp_avg of x")


def test_the_largest_numbers_and_no_numbers_are_finite() -> None:
    limits = torch.finfo(torch.float32)
    assert all_finite(torch.tensor([limits.max, limits.min, limits.tiny]))
    assert all_finite(torch.empty(0, 3)) and all_finite(torch.tensor(1.0))
