"""``--data-mix``: the sources of a mixture as they are written on the command line."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

MIX_FORM = "NAME=WEIGHT:GLOB"
_MIX = re.compile(
    r"\s*(?P<name>[\w.-]+)\s*=\s*(?P<weight>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?)\s*:(?P<glob>.*)",
    re.DOTALL,
)


class MixedSource(NamedTuple):
    """One source of a mixture."""

    name: str
    weight: str
    """A decimal number, as written; weights need not add up to 1."""
    glob: str


def mixed_source(text: str) -> MixedSource:
    """The source in ``NAME=WEIGHT:GLOB``, whose weight may still be 0 or below; raises ValueError."""
    match = _MIX.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return MixedSource(match["name"], match["weight"], match["glob"].strip())


def mixture_problems(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the sources that were given together, each in one line."""
    sources: list[MixedSource] = [source for source in given.get("data_mix", ()) if source is not None]
    problems = []
    names = [source.name for source in sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"--data-mix names {name} twice: give each source a name of its own")
    for name, weight, glob in sources:
        if Fraction(weight) <= 0:
            problems.append(f"--data-mix {name}={weight}: the weight must be above 0; leave the source out")
        if not glob:
            problems.append(f"--data-mix {name}={weight}: it names no shards; give {MIX_FORM}")
    if "data_mix" in given and "data_glob" in given:
        problems.append("--data-mix contradicts --data-glob: name its shards as a source, or leave one out")
    return problems
