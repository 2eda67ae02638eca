"""Flags as fields of dataclasses: parser, bounds and table from one definition.

The parser collects what is wrong instead of leaving at the first mistake. Standard library only.
"""

import argparse
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from argonne.config.mixture import MIX_FORM, mixed_source

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """How one field appears on the command line and which values it takes."""

    text: str
    """its help"""
    kind: Callable[[str], Any] = str
    """converts a value; raises ValueError"""
    names: tuple[str, ...] = ()
    """as typed, where that is not the field's own name"""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    count: int = 1
    """values it takes"""
    many: bool = False
    """takes one value or more, and may be repeated"""
    repeated: bool = False
    """may be given several times, each adding a value"""
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    default_text: str | None = None
    """what the help says of the default, where the value does not say it"""
    alone: str | None = None
    """the value of the flag given without one; a value then follows after ``=``"""


def flag(default: Any, text: str, **rules: Any) -> Any:
    """A dataclass field that is a flag; ``text`` serves as its documentation and its ``--help``."""
    return dataclasses.field(default=default, metadata={"flag": Flag(text=text, **rules)})


def duration(text: str) -> float:
    """Seconds from ``3600``, ``90m``, ``23h30m`` or ``1d``; raises ValueError."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    if match is None or not any(match.groups()):
        raise ValueError(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def named_glob(text: str) -> tuple[str, str]:
    """(name, glob) from ``NAME=GLOB``; raises ValueError."""
    name, _, pattern = text.partition("=")
    if not name.strip() or not pattern.strip():
        raise ValueError(text)
    return name.strip(), pattern.strip()


def step_window(text: str) -> str:
    """``START:STEPS``, as it is written: two whole numbers from 1 on; raises ValueError."""
    start, steps = window_of(text)
    return f"{start}:{steps}"


def window_of(text: str) -> tuple[int, int]:
    """(first step, number of steps) of a ``START:STEPS``; raises ValueError."""
    start, _, steps = text.partition(":")
    if not (start.strip().isdecimal() and steps.strip().isdecimal() and int(start) and int(steps)):
        raise ValueError(text)
    return int(start), int(steps)


def flag_fields(owner: type) -> Iterator[tuple[dataclasses.Field[Any], Flag]]:
    """The fields of a dataclass that are flags, each with its rules."""
    for field in dataclasses.fields(owner):
        if "flag" in field.metadata:
            yield field, field.metadata["flag"]


def flag_names(field: dataclasses.Field[Any], rules: Flag) -> tuple[str, ...]:
    """How a field is written on the command line; the first one names it in messages."""
    return rules.names or ("--" + field.name.replace("_", "-"),)


def _default_text(field: dataclasses.Field[Any], rules: Flag) -> str:
    if rules.default_text is not None:
        return rules.default_text
    if isinstance(field.default, bool) or field.default is None:
        return "off" if isinstance(field.default, bool) else "none"
    if isinstance(field.default, tuple):
        return " ".join(str(value) for value in field.default)
    return str(field.default)


class FlagParser(argparse.ArgumentParser):
    """Collects what is wrong with single values, so that one run reports every problem."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, exit_on_error=False)
        self.problems: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving, so that the problems found so far are printed with this one."""
        raise argparse.ArgumentError(None, message)

    def add_flags(self, title: str, owner: type) -> None:
        """A group of ``--help`` with every flag among the fields of a dataclass."""
        group = self.add_argument_group(title, owner.__doc__)
        for field, rules in flag_fields(owner):
            _add_flag(self, group, field, rules)

    def converter(self, name: str, rules: Flag) -> Callable[[str], Any]:
        """``kind``, but a text that it refuses becomes a problem and the value None."""

        def convert(text: str) -> Any:
            try:
                value = rules.kind(text)
            except ValueError:
                self.problems.append(f"{name} {text}: {_wanted(rules)}")
                return None
            problem = _value_problem(value, rules)
            if problem is not None:
                self.problems.append(f"{name} {text}: {problem}")
                return None
            return value

        return convert


def _wanted(rules: Flag) -> str:
    if rules.kind is named_glob:
        return "give NAME=GLOB"
    if rules.kind is step_window:
        return "give START:STEPS, two whole numbers from 1 on, such as 100:5"
    if rules.kind is mixed_source:
        return f"give {MIX_FORM}, the name of letters and digits, the weight a decimal number"
    if rules.kind is int:
        return "give a whole number"
    if rules.metavar == "N|auto":
        return "give a whole number, or auto"
    return "give seconds, or a time such as 23h30m" if rules.kind is duration else "give a number"


def _value_problem(value: Any, rules: Flag) -> str | None:
    """The bound that a converted value breaks, or None."""
    if rules.choices and value not in rules.choices:
        return f"choose {', '.join(rules.choices[:-1])} or {rules.choices[-1]}"
    if isinstance(value, tuple):  # its kind has checked it
        return None
    if isinstance(value, str):
        return None if value.strip() else "it is empty; give a value"
    if not math.isfinite(value):
        return "give a finite number"
    if rules.at_least is not None and value < rules.at_least:
        return f"must be at least {rules.at_least:g}"
    if rules.at_most is not None and value > rules.at_most:
        return f"must be at most {rules.at_most:g}"
    if rules.above is not None and value <= rules.above:
        return f"must be above {rules.above:g}"
    if rules.below is not None and value >= rules.below:
        return f"must be below {rules.below:g}"
    return None


def _add_flag(
    parser: FlagParser, group: argparse._ArgumentGroup, field: dataclasses.Field[Any], rules: Flag
) -> None:
    names = flag_names(field, rules)
    text = f"{rules.text} ({_default_text(field, rules)})"
    keywords: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
    }
    if isinstance(field.default, bool):
        keywords["action"] = "store_false" if field.default else "store_true"
    else:
        keywords["type"] = parser.converter(names[0], rules)
        kind_names = {int: "N", float: "X"}
        keywords["metavar"] = rules.metavar or (
            "{" + ",".join(rules.choices) + "}" if rules.choices else kind_names.get(rules.kind, "TEXT")  # type: ignore[call-overload]
        )
        if rules.count > 1:
            keywords["nargs"] = rules.count
        if rules.many:
            keywords |= {"nargs": "+", "action": "extend"}
        if rules.alone is not None:
            keywords |= {"nargs": "?", "const": rules.alone}
        if rules.repeated:
            keywords["action"] = "append"
    group.add_argument(*names, **keywords)


def _unknown_problems(parser: argparse.ArgumentParser, leftover: Sequence[str]) -> list[str]:
    known = list(parser._option_string_actions)
    problems, stray = [], []
    after_flag = False
    for token in leftover:
        if token.startswith("--"):
            name = token.split("=", 1)[0]
            close = get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            problems.append(f"{name} is not a flag: {hint}")
        elif not after_flag:
            stray.append(token)
        after_flag = token.startswith("--") and "=" not in token
    if stray:
        others = f" (nor are {len(stray) - 1} others)" if len(stray) > 1 else ""
        expanded = all(Path(token).exists() for token in stray)  # the shell did what --data-glob does itself
        hint = "quote a pattern of files" if expanded else "remove it, or see --help"
        problems.append(f"{stray[0]} is not a flag{others}: {hint}")
    return problems


def parse_given(parser: FlagParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags that were given, and what is wrong with them one by one."""
    remaining, structural = list(argv), []
    while True:
        parser.problems.clear()
        try:
            namespace, leftover = parser.parse_known_args(remaining)
            break
        except argparse.ArgumentError as error:
            # argparse stops at a flag without its value: note it, take the flag out, read the rest.
            names = (error.argument_name or "").split("/")
            at = [index for index, token in enumerate(remaining) if token.split("=", 1)[0] in names]
            structural.append(f"{names[0]}: {error.message}")
            if not at:
                return {}, structural
            last = at[-1]
            values = itertools.takewhile(lambda token: not token.startswith("--"), remaining[last + 1 :])
            del remaining[last : last + 1 + len(list(values))]
    problems = structural + parser.problems + _unknown_problems(parser, leftover)
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()
    }
    return given, problems


def flag_table(parser: argparse.ArgumentParser) -> str:
    """A Markdown table of every flag: name and value, default, meaning."""
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        count = action.nargs if isinstance(action.nargs, int) else 1
        value = " " + " ".join([str(action.metavar)] * count) if count else ""
        value = f"[={action.metavar}]" if action.nargs == "?" else value
        value += " ..." if action.nargs == "+" else ""
        names = ", ".join(action.option_strings)
        meaning, _, default = str(action.help).rpartition(" (")
        cells = (f"`{names}{value}`", default.removesuffix(")"), meaning.replace("%%", "%"))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def fill(owner: type[Options], given: Mapping[str, Any], **more: Any) -> Options:
    """The dataclass with the flags that were given and are sound; defaults for the rest."""
    sound = {
        field.name: given[field.name] for field, _ in flag_fields(owner) if given.get(field.name) is not None
    }
    sound = {
        name: value for name, value in sound.items() if not isinstance(value, tuple) or None not in value
    }
    return owner(**sound, **more)
