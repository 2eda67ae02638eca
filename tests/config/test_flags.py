"""Flags as fields: durations, bounds, and the table of them all."""

import re

import pytest

from argonne.config.command_line import (
    build_parser,
)
from argonne.config.flags import duration, flag_table

NEEDED = ["--tokenizer-path", "tok"]


def test_the_table_has_every_flag_once() -> None:
    table = flag_table(build_parser())
    names = re.findall(r"^\| `(--[\w-]+)", table, flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 40
    assert "| `--min-learning-rate X` | 1e-05 |" in table and "`--local_rank, --local-rank N`" in table
    assert "NAME\\|FILE" in table  # a bar inside a cell


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("23h30m", 84600), ("1d", 86400), ("5m1s", 301)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5", "30m1h", "5 apples", "1h30"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        duration(text)
