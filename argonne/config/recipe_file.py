"""Recipe files (``--config``): TOML with flags as keys, read into layers of flags, and written from a run.

Standard library only.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from argonne.config.flags import Flag, FlagParser, flag_fields, flag_names
from argonne.config.mixture import MixedSource
from argonne.config.options import RunConfig
from argonne.config.recipe import ONE_OF, Recipe, groups, stage_fields
from argonne.config.run_options import RecipeOptions
from argonne.errors import ConfigError

TABLES = {"eval_data": "glob", "data_mix": "weight and glob"}
"""Fields that a file gives as tables, and what each entry holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """The flags that one table of a file gives, by field name."""

    given: dict[str, Any]
    name: str = ""
    """The stage's; "" at the top."""
    reset_optimizer: bool = False


def _keys() -> dict[str, tuple[dataclasses.Field[Any], Flag]]:
    """Key of a recipe -> its field and rules: every flag but those about recipes themselves."""
    owners = [owner for _, owner in groups() if owner is not RecipeOptions]
    return {
        name.removeprefix("--").replace("_", "-"): (field, rules)
        for owner in (*owners, RunConfig)
        for field, rules in flag_fields(owner)
        for name in flag_names(field, rules)
    }


def read_layers(path: str) -> tuple[Layer, tuple[Layer, ...], list[str]]:
    """(top of the file, its stages, problems with their place in it).

    Raises ConfigError where the file cannot be read as TOML.
    """
    try:
        document = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}): give a recipe file") from error
    except ValueError as error:
        raise ConfigError(f"--config {path} is not valid TOML ({error}): fix the file") from error
    tables = document.pop("stage", [])
    top = _TableReader(path, _keys())
    layer = top.read(document)
    problems = top.problems
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return layer, (), [*problems, f'{path}: "stage" is no list of tables: write [[stage]]']
    stages: list[Layer] = []
    for number, table in enumerate(tables, 1):
        name = table.pop("name", None)
        if not isinstance(name, str) or not name.strip():
            problems.append(f"{path}: stage {number} has no name: give it one")
            name = str(number)
        elif name in [stage.name for stage in stages]:
            problems.append(f"{path}: two stages are named {name}: rename one")
        reset = table.pop("reset-optimizer", table.pop("reset_optimizer", False))
        if not isinstance(reset, bool):
            problems.append(f"{path}, stage {name}: reset-optimizer: give true or false")
        reader = _TableReader(f"{path}, stage {name}", _keys(), stage=True)
        stages.append(dataclasses.replace(reader.read(table), name=name, reset_optimizer=reset is True))
        problems += reader.problems
    return layer, tuple(stages), problems


class _TableReader:
    """Turns the keys of one table into flags, and collects what is wrong with them."""

    def __init__(
        self, place: str, keys: Mapping[str, tuple[dataclasses.Field[Any], Flag]], *, stage: bool = False
    ) -> None:
        self._place, self._keys = place, keys
        self._allowed = stage_fields() if stage else None
        self._extra = ("name", "reset-optimizer") if stage else ("stage",)
        self._parser = FlagParser(place, "")
        self._wrong: list[str] = []

    @property
    def problems(self) -> list[str]:
        """One line each, with the place in the file."""
        return [f"{self._place}: {problem}" for problem in (*self._wrong, *self._parser.problems)]

    def read(self, table: Mapping[str, Any]) -> Layer:
        """The flags of the table; unsound ones are left out."""
        given: dict[str, Any] = {}
        for written, value in table.items():
            key = written.replace("_", "-")
            if key not in self._keys:
                self._wrong.append(f"{written} is not a key: did you mean {self._nearest(key)}?")
                continue
            field, rules = self._keys[key]
            if self._allowed is not None and field.name not in self._allowed:
                self._wrong.append(f"{written} holds for the whole run: give it above the first [[stage]]")
            elif field.name in given:
                self._wrong.append(f"{written} is given twice: leave one out")
            else:
                given[field.name] = self._value(key, field, rules, value)
        return Layer(given={name: value for name, value in given.items() if value is not None})

    def _nearest(self, key: str) -> str:
        allowed = [
            name
            for name, (field, _) in self._keys.items()
            if self._allowed is None or field.name in self._allowed
        ]
        return difflib.get_close_matches(key, [*allowed, *self._extra], n=1, cutoff=0.0)[0]

    def _value(self, key: str, field: dataclasses.Field[Any], rules: Flag, value: Any) -> Any:
        if isinstance(field.default, bool):
            if not isinstance(value, bool):
                self._wrong.append(f"{key}: give true or false")
                return None
            return not field.default if value else field.default
        if isinstance(value, dict) and field.name in TABLES:
            value = self._entries(key, TABLES[field.name], value)
            if value is None:
                return None
        values = value if isinstance(value, list) else [value]
        texts = [_text_of(one, rules) for one in values]
        several = rules.many or rules.repeated or rules.count > 1
        if None in texts or (isinstance(value, list) and not several):
            self._wrong.append(f"{key}: give {'a list of values' if several else 'a text or a number'}")
            return None
        if rules.repeated and not texts:
            self._wrong.append(f"{key}: give at least one value")
            return None
        if rules.count > 1 and len(texts) != rules.count:
            self._wrong.append(f"{key}: give {rules.count} values")
            return None
        convert = self._parser.converter("--" + key, rules)
        found = tuple(convert(text) for text in texts if text is not None)
        if None in found:
            return None
        return found if several else found[0]

    def _entries(self, key: str, wanted: str, table: Mapping[str, Any]) -> list[str] | None:
        """The entries of [data-mix] or [eval-data] as the command line writes them; None where wrong."""
        texts = []
        for name, entry in table.items():
            if wanted == "glob" and isinstance(entry, dict):
                entry = entry.get("glob") if entry.keys() == {"glob"} else None
            if wanted == "glob" and isinstance(entry, str) and "=" not in name:
                texts.append(f"{name}={entry}")
            elif isinstance(entry, dict) and entry.keys() == {"weight", "glob"} and "=" not in name:
                texts.append(f"{name}={_text_of(entry['weight'], None)}:{entry['glob']}")
            else:
                self._wrong.append(f"{key}.{name}: give {wanted}, and a name without =")
                return None
        return texts


def _text_of(value: Any, rules: Flag | None) -> str | None:
    """A value as the command line writes it; None where it is no text and no number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and value.is_integer() and rules is not None and rules.kind is int:
        return str(int(value))
    return str(value)


def recipe_toml(recipe: Recipe) -> str:
    """A recipe file that asks for the same run: every key that has a value, the stages with their own."""
    written = [_written(stage.config) for stage in recipe.stages]
    common = {
        key: value
        for key, value in written[0].items()
        if all(key in other and other[key] == value for other in written)
    }
    lines = ["# The resolved configuration of a run: --config with this file repeats it.", *_toml(common, "")]
    for stage, values in zip(recipe.stages, written, strict=True):
        if stage.name:
            own = {key: value for key, value in values.items() if key not in common}
            head = ["", "[[stage]]", f"name = {_quoted(stage.name)}"]
            head += ["reset-optimizer = true"] if stage.reset_optimizer else []
            lines += [*head, *_toml(own, "stage.")]
    return "\n".join(lines) + "\n"


def _written(config: RunConfig) -> dict[str, Any]:
    """Key -> value of every flag with a value, as a file gives it."""
    values: dict[str, Any] = {}
    owners = [(getattr(config, name), owner) for name, owner in groups() if owner is not RecipeOptions]
    for options, owner in (*owners, (config, RunConfig)):
        for field, rules in flag_fields(owner):
            value = getattr(options, field.name)
            if isinstance(field.default, bool):
                value = value != field.default
            if rules.repeated and len(value) == 1:
                value = value[0]
            if value is not None and value != () and field.name != "local_rank":
                values[flag_names(field, rules)[0].removeprefix("--")] = value
    for first, second in ONE_OF:
        first, second = first.replace("_", "-"), second.replace("_", "-")
        if first in values and values[first] is not False:
            values.pop(second, None)
    if "token-column" in values and "data-mix" not in values:
        values.pop("text-column", None)  # of one source the two contradict each other
    return values


def _toml(values: Mapping[str, Any], prefix: str) -> list[str]:
    """The lines of a table, what is a table itself at the end."""
    tables = {key: value for key, value in values.items() if key.replace("-", "_") in TABLES}
    lines = [f"{key} = {_toml_value(value)}" for key, value in values.items() if key not in tables]
    for key, entries in tables.items():
        lines += ["", f"[{prefix}{key}]"]
        lines += [f"{_quoted(name)} = {_toml_value(entry)}" for name, entry in _named_entries(entries)]
    return lines


def _named_entries(entries: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for entry in entries:
        if isinstance(entry, MixedSource):
            yield entry.name, {"weight": entry.weight, "glob": entry.glob}
        else:
            yield entry


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, int | float) else _quoted(str(value))


def _quoted(text: str) -> str:
    """A TOML string: JSON's escapes are TOML's, but for DEL, which JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
