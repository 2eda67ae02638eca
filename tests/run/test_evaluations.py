"""A validation's line: perplexity and bits per byte by their definitions, where they are known."""

import json
import math
from typing import Any

import pytest

from argonne.run.evaluations import ValidationRecord


def record(**changes: Any) -> ValidationRecord:
    common: dict[str, Any] = {"step": 20, "name": "web", "loss": math.log(8.0), "samples": 5, "tokens": 80}
    return ValidationRecord(**{**common, "text_bytes": 60, "seconds": 1.5, **changes})


def test_a_loss_of_three_bits_a_token() -> None:
    line = record(extra={"stage": "anneal"}).line()
    assert line["perplexity"] == pytest.approx(8.0, rel=1e-12)
    assert line["bits_per_byte"] == pytest.approx(3.0 * 80 / 60, rel=1e-12)
    assert (line["step"], line["name"], line["samples"], line["tokens"]) == (20, "web", 5, 80)
    assert (line["seconds"], line["stage"]) == (1.5, "anneal")
    assert json.loads(json.dumps(line)) == line


def test_without_bytes_there_are_no_bits_per_byte() -> None:
    found = record(text_bytes=0)
    assert found.line()["bits_per_byte"] is None
    assert found.text() == "Validation web at step 20 | Loss: 2.0794 | Perplexity: 8.00"
    assert record().text().endswith(" | Perplexity: 8.00 | Bits per byte: 4.0000")


@pytest.mark.parametrize("loss", [700.0, 1e6, math.inf])
def test_a_loss_beyond_exp_is_an_infinite_perplexity(loss: float) -> None:
    assert record(loss=loss).line()["perplexity"] == math.inf
    assert "Perplexity: inf" in record(loss=loss).text()


def test_a_loss_that_is_no_number_stays_none() -> None:
    assert math.isnan(record(loss=math.nan).line()["perplexity"])
    assert record(loss=699.0).line()["perplexity"] == math.exp(699.0)
