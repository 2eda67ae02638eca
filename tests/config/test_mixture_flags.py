"""--data-mix, --shuffle and --holdout on the command line."""

import pytest

from argonne.config.command_line import parse_command_line
from argonne.config.mixture import MixedSource
from argonne.config.options import DataOptions
from argonne.config.recipe import flag_values
from tests.config.test_command_line import NEEDED, problems


def test_sources_in_the_order_in_which_they_are_named() -> None:
    """Several after one flag, the flag again, a URL's colons; weights stay as they were written."""
    config = parse_command_line(
        [*NEEDED, "--data-mix", "web=0.70:w/*.parquet", "code=3:hf://x/y@z:1/*", "--data-mix", "b-2.x=.5:/b"]
    )
    assert config.data.data_mix == (
        MixedSource("web", "0.70", "w/*.parquet"),
        MixedSource("code", "3", "hf://x/y@z:1/*"),
        MixedSource("b-2.x", ".5", "/b"),
    )
    assert flag_values(config)["--data-mix"] == config.data.data_mix
    assert parse_command_line([*NEEDED, "--data-mix", "a=1e-3:x"]).data.data_mix[0].weight == "1e-3"
    plain = parse_command_line([*NEEDED, "--shuffle", "--holdout", "20"]).data
    assert plain == DataOptions(tokenizer_path="tok", shuffle=True, holdout=20)


@pytest.mark.parametrize(
    "text",
    [
        *("web", "web=1", "web:1=x", "=1:x", "web=:x", "web=one:x", "web=1/3:x", "web=nan:x"),
        *("web=inf:x", "a b=1:x", "web=1e9999:x", "web=0x1:x", "web=1,5:x"),
    ],
)
def test_a_source_that_cannot_be_read(capsys: pytest.CaptureFixture[str], text: str) -> None:
    (line,) = problems(capsys, *NEEDED, "--data-mix", text)
    assert line.startswith(f"error: --data-mix {text}: give NAME=WEIGHT:GLOB")


def test_every_problem_of_a_mixture_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    sources = ["a=0:x", "b=-1:y", "a=1:z", "c=2:", "d=0.0:x", "e"]
    more = ["--data-glob", "g", "--shuffle", "--no-streaming", "--holdout", "1"]
    lines = problems(capsys, *NEEDED, "--data-mix", *sources, *more)
    for expected in (
        "--data-mix a=0: the weight must be above 0",
        "--data-mix b=-1: the weight must be above 0",
        "--data-mix d=0.0: the weight must be above 0",
        "--data-mix names a twice",
        "--data-mix c=2: it names no shards",
        "--data-mix e: give NAME=WEIGHT:GLOB",
        "--data-mix contradicts --data-glob",
        "--shuffle contradicts --no-streaming",
        "--holdout 1: must be at least 2",
    ):
        assert sum(expected in line for line in lines) == 1, (expected, lines)
    assert len(lines) == 9
    assert problems(capsys, *NEEDED, "--data-mix") == ["error: --data-mix: expected at least one argument"]
