"""The plan: degrees that fit the heads, and those that are refused."""

from typing import Any

import pytest
import torch

from argonne.errors import ConfigError
from argonne.testing.models import small_model
from argonne.tp.architectures import ARGONNE_PLAN
from argonne.tp.plan import build_slice_map, check_degree, degree_fits, fitting_degrees


def test_fitting_degrees() -> None:
    assert fitting_degrees(24, 8) == [1, 2, 4, 8, 24]
    assert fitting_degrees(6, 2) == [1, 2, 6]
    assert fitting_degrees(8, 8) == [1, 2, 4, 8]
    assert fitting_degrees(7, 1) == [1, 7]
    assert fitting_degrees(1, 1) == [1]


@pytest.mark.parametrize(
    ("query", "key_value", "tp_size", "listed"),
    [
        (24, 8, 16, "1, 2, 4, 8 or 24"),
        (24, 8, 12, "1, 2, 4, 8 or 24"),
        (24, 8, 3, "1, 2, 4, 8 or 24"),
        (6, 2, 3, "1, 2 or 6"),
        (7, 1, 2, "1 or 7"),
        (1, 1, 2, "1"),
    ],
)
def test_refused_degrees_name_those_that_work(query: int, key_value: int, tp_size: int, listed: str) -> None:
    assert not degree_fits(query, key_value, tp_size)
    with pytest.raises(ConfigError) as refusal:
        check_degree(query, key_value, tp_size)
    message = str(refusal.value)
    assert message.startswith(f"--tensor-parallel-size {tp_size} does not divide {key_value} key/value heads")
    assert message.endswith(f"; use {listed}")
    for degree in fitting_degrees(query, key_value):
        check_degree(query, key_value, degree)


def test_a_degree_is_refused_before_any_weight_is_looked_at() -> None:
    changes: dict[str, Any] = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 2}
    with torch.device("meta"):
        model = small_model(**changes)
    with pytest.raises(ConfigError, match="use 1, 2, 4, 8 or 24"):
        build_slice_map(model, ARGONNE_PLAN, 16)
