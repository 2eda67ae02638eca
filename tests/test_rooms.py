"""The import rule: which room may import which, and what the top level holds."""

import ast
import graphlib
from pathlib import Path

import pytest

from argonne.tools.imports import floors, imported_names, module_arrows, module_files, room_arrows, room_of
from tests import ROOT

GROUND = {"argonne.errors", "argonne.files"}
DOORS = {"model", "tp_shard", "data_stream", "checkpointing"}
BEHIND = {"argonne.tp", "argonne.data", "argonne.checkpoint"}
ENTRY = "resume_pretrain_tensor"

MAY_IMPORT: dict[str, set[str]] = {
    "argonne.errors": set(),
    "argonne.files": set(),
    "model": set(),
    "argonne.config": GROUND,
    "argonne.run": GROUND,
    "argonne.tp": GROUND,
    "argonne.data": GROUND,
    "argonne.ranks": GROUND | {"argonne.tp", "argonne.run"},
    "argonne.checkpoint": GROUND | {"model", "argonne.tp", "argonne.data"},
    "tp_shard": GROUND | {"argonne.tp"},
    "data_stream": GROUND | {"argonne.data"},
    "checkpointing": GROUND | {"argonne.checkpoint"},
    "argonne.verification": GROUND | {"model", "tp_shard", "argonne.tp", "argonne.ranks"},
    "argonne.training": GROUND
    | DOORS
    | {"argonne.config", "argonne.run", "argonne.ranks", "argonne.verification"},
    ENTRY: GROUND | DOORS | {"argonne.config", "argonne.run", "argonne.ranks", "argonne.training"},
}
SUITE = set(MAY_IMPORT)
# Commands, benchmarks and tests look at every room; nothing of the suite looks at them.
MAY_IMPORT |= {
    "argonne.tools": SUITE,
    "argonne.testing": SUITE | {"argonne.tools"},
    "argonne.benchmarks": SUITE | {"argonne.tools", "argonne.testing"},
    "scripts": SUITE | {"argonne.tools", "argonne.benchmarks"},
    "tests": SUITE | {"argonne.tools", "argonne.testing", "argonne.benchmarks", "scripts"},
}

TOP_LEVEL = {
    *(f"{door}.py" for door in (ENTRY, *DOORS)),
    *("argonne", "benchmarks", "docs", "recipes", "scripts", "tests"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "constraints.txt"),
}
"""Names beside those that begin with a dot."""


def violations(root: Path) -> list[str]:
    """What breaks the import rule in a checkout, one line for each import."""
    found = []
    for module, target in module_arrows(root):
        room, other = room_of(module), room_of(target)
        if room not in MAY_IMPORT:
            found.append(f"{module}: the room {room} is not in the table")
        elif other != room and other not in MAY_IMPORT[room]:
            found.append(f"{module} imports {target}")
    for module, file in module_files(root).items():
        if (
            file.name == "__init__.py"
            and file.parts[len(root.parts)] == "argonne"
            and file.read_text().strip()
        ):
            found.append(f"{module}/__init__.py is not empty")
    return sorted(set(found))


def test_every_import_points_down() -> None:
    assert violations(ROOT) == []


def test_the_table_has_no_room_that_is_gone_and_no_circle() -> None:
    rooms = room_arrows(module_arrows(ROOT))
    assert MAY_IMPORT.keys() == rooms.keys()
    height = floors(MAY_IMPORT)
    assert height["argonne.tp"] < height["tp_shard"] < height["argonne.verification"]
    assert height["argonne.verification"] < height["argonne.training"] < height[ENTRY]


def test_doors_only_from_training_on() -> None:
    """The table itself keeps the rule: no room imports its own door, the loop imports nothing behind one."""
    assert not MAY_IMPORT["argonne.training"] & BEHIND and not MAY_IMPORT[ENTRY] & BEHIND
    for door, room in (
        ("tp_shard", "argonne.tp"),
        ("data_stream", "argonne.data"),
        ("checkpointing", "argonne.checkpoint"),
    ):
        assert door not in MAY_IMPORT[room] and room in MAY_IMPORT[door]
    assert all(not targets & {"scripts", "tests"} for room, targets in MAY_IMPORT.items() if room != "tests")
    assert MAY_IMPORT["model"] == set()


def names_at_import(source: str) -> set[str]:
    """What a module imports while it is itself imported: not in functions, not under TYPE_CHECKING."""
    kept = [
        node
        for node in ast.parse(source).body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)
    ]
    return set(imported_names(ast.unparse(ast.Module(kept, []))))


def circle(root: Path) -> list[str]:
    """Modules that import each other while they are imported; empty where there are none."""
    files = module_files(root)
    graph = {
        module: (names_at_import(file.read_text(encoding="utf-8")) & files.keys()) - {module}
        for module, file in files.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert circle(ROOT) == []


def test_the_top_level_holds_the_doors_and_the_usual_files() -> None:
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    ignored |= {path.name for path in ROOT.glob("*.egg-info")}
    assert visible - ignored <= TOP_LEVEL
    assert {path.name for path in ROOT.glob("*.py")} <= TOP_LEVEL


SOUND = {
    "argonne/__init__.py": "",
    "argonne/errors.py": "import sys\n",
    "argonne/tp/__init__.py": "",
    "argonne/tp/slices.py": "from argonne.errors import ConfigError\n",
    "argonne/training/__init__.py": "",
    "argonne/training/step.py": "import tp_shard\nfrom argonne.errors import ConfigError\n",
    "tp_shard.py": "from argonne.tp.slices import SliceMap\n",
    "model.py": "import torch\n",
    "scripts/show.py": "def main():\n    from argonne.training.step import step\n",
    "tests/__init__.py": "ROOT = 1\n",
    "tests/tp/test_slices.py": "from argonne.tp import slices\nimport show\n",
}
PLANTED = {
    "a room imports its own door": (
        "argonne/tp/slices.py", "import tp_shard\n", "argonne.tp.slices imports tp_shard"),
    "training looks behind a door": (
        "argonne/training/step.py", "from argonne.tp import slices\n",
        "argonne.training.step imports argonne.tp.slices"),
    "an import upwards inside a function": (
        "argonne/errors.py", "def f():\n    import argonne.tp.slices\n",
        "argonne.errors imports argonne.tp.slices"),
    "the model imports one of ours": (
        "model.py", "from argonne.errors import ConfigError\n", "model imports argonne.errors"),
    "the package imports a script": (
        "argonne/tp/slices.py", "import show\n", "argonne.tp.slices imports scripts.show"),
    "a script imports a test": (
        "scripts/show.py", "from tests.tp.test_slices import x\n",
        "scripts.show imports tests.tp.test_slices"),
    "an __init__ that is not empty": (
        "argonne/tp/__init__.py", "import torch\n", "argonne.tp/__init__.py is not empty"),
    "a room that the table lacks": (
        "argonne/attic/old.py", "import argonne.errors\n",
        "argonne.attic.old: the room argonne.attic is not in the table"),
}  # fmt: skip


def plant(root: Path, *files: tuple[str, str]) -> Path:
    for name, text in (*SOUND.items(), *files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_sound_tree_passes(tmp_path: Path) -> None:
    assert violations(plant(tmp_path)) == [] and circle(tmp_path) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_caught(tmp_path: Path, name: str) -> None:
    file, text, said = PLANTED[name]
    assert violations(plant(tmp_path, (file, text))) == [said]


def test_a_planted_circle_is_caught(tmp_path: Path) -> None:
    inner = ("argonne/tp/fused.py", "from argonne.tp.slices import a\n")
    plant(tmp_path, inner, ("argonne/tp/slices.py", "from argonne.tp.fused import b\n"))
    assert set(circle(tmp_path)) == {"argonne.tp.fused", "argonne.tp.slices"}
    lazily = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from argonne.tp.fused import b\n"
    plant(tmp_path, inner, ("argonne/tp/slices.py", lazily))
    assert circle(tmp_path) == []
