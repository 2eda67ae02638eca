"""The plan: degrees that fit the heads, and those that are refused."""

from typing import Any

import pytest
import torch

from argonne.errors import ConfigError
from argonne.testing.models import small_model
from argonne.tp.architectures import ARGONNE_PLAN
from argonne.tp.plan import build_slice_map, check_degree, degree_fits, fitting_degrees


def test_fitting_degrees() -> None:
    assert fitting_degrees(6) == [1, 2, 3, 4, 5, 6]
    assert fitting_degrees(1) == [1]


@pytest.mark.parametrize(
    ("query", "tp_size", "listed"),
    [(24, 25, "1 to 24"), (24, 0, "1 to 24"), (6, 8, "1 to 6"), (2, 3, "1 or 2"), (1, 2, "1")],
)
def test_refused_degrees_name_those_that_work(query: int, tp_size: int, listed: str) -> None:
    assert not degree_fits(query, tp_size)
    with pytest.raises(ConfigError) as refusal:
        check_degree(query, tp_size)
    message = str(refusal.value)
    assert message.startswith(f"--tensor-parallel-size {tp_size} leaves ranks without any of the {query} ")
    assert message.endswith(f"; use {listed}")
    for degree in fitting_degrees(query):
        check_degree(query, degree)


def test_a_degree_is_refused_before_any_weight_is_looked_at() -> None:
    changes: dict[str, Any] = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 2}
    with torch.device("meta"):
        model = small_model(**changes)
    with pytest.raises(ConfigError, match="use 1 to 24"):
        build_slice_map(model, ARGONNE_PLAN, 25)
