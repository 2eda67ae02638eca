"""The map of the repository: a commented tree, each phrase the first line of a file's docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

DOORS = ("resume_pretrain_tensor", "model", "tp_shard", "data_stream", "checkpointing")
ROOMS = {
    "argonne.config": "flags, options, presets",
    "argonne.run": "signals, stalls, status, metrics",
    "argonne.tp": "plan, slices, layers, loss",
    "argonne.data": "parquet rows to exact tokens",
    "argonne.ranks": "processes, groups, replicas",
    "argonne.checkpoint": "one verified file, any layout",
    "argonne.verification": "split against unsharded",
    "argonne.training": "what the recipe is made of",
}
"""The rooms of the suite, from the ground up."""
WORKSHOPS = {
    "argonne.tools": "parts of the commands in scripts/",
    "argonne.benchmarks": "what scripts/benchmark.py measures",
    "argonne.testing": "what tests and benchmarks share",
}
OUTSIDE = {
    "docs": "parallelism, data, checkpoints, distillation, performance, architecture, how-tos",
    "scripts": "commands, each with --help",
    "tests": "mirror the rooms: tests/tp/test_slices.py tests argonne/tp/slices.py",
}
_COLUMN = 34
_SECOND_COLUMN, _SECOND_NAME, _WIDTH = 72, 18, 120
_SHORTEST, _LONGEST = 18, 72


def phrase(file: Path) -> str:
    """The first sentence of a module's docstring; a long one up to its first colon, semicolon or comma."""
    first, *_ = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")
    sentence = first.split(". ")[0].rstrip(".")
    if len(sentence) <= _LONGEST:
        return sentence
    return next(
        (sentence[: at.start()] for at in re.finditer("[:;,]", sentence) if at.start() >= _SHORTEST), sentence
    )


def in_columns(files: Sequence[tuple[str, str]], line: Callable[[int, str, str], str]) -> Iterator[str]:
    """A line for each file; two neighbours share one where their phrases are short, so that the map fits."""
    at = 0
    while at < len(files):
        first = line(2, *files[at])
        pair = ""
        if at + 1 < len(files) and len(first) < _SECOND_COLUMN:
            name, words = files[at + 1]
            pair = f"{first:{_SECOND_COLUMN}}{name:{_SECOND_NAME}} {words}"
        both = bool(pair) and len(pair) <= _WIDTH
        yield pair if both else first
        at += 2 if both else 1


def tree(root: Path) -> str:
    """Doors and rooms with a phrase for each file; commands, tests and what they share in a line a folder."""

    def line(indent: int, name: str, words: str) -> str:
        return f"{'    ' * indent + name:{_COLUMN}}{words}".rstrip()

    def lines() -> Iterator[str]:
        for door in DOORS:
            yield line(0, f"{door}.py", phrase(root / f"{door}.py"))
        yield line(0, "argonne/", "")
        for file in sorted((root / "argonne").glob("[!_]*.py")):
            yield line(1, file.name, phrase(file))
        for room, words in ROOMS.items():
            name = room.removeprefix("argonne.")
            yield line(1, f"{name}/", words)
            files = sorted((root / "argonne" / name).glob("[!_]*.py"))
            yield from in_columns([(file.name, phrase(file)) for file in files], line)
        for room, words in WORKSHOPS.items():
            yield line(1, f"{room.removeprefix('argonne.')}/", words)
        for name, words in OUTSIDE.items():
            yield line(0, f"{name}/", words)

    return "\n".join(lines())
