"""Who imports whom in this repository: modules, their rooms, and the arrows between rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FOLDERS = ("argonne", "scripts", "tests")


def module_files(root: Path) -> dict[str, Path]:
    """Module name -> file: the top level, the package, the scripts and the tests."""
    files = [*root.glob("*.py")]
    for folder in FOLDERS:
        files += (root / folder).rglob("*.py")
    named = {}
    for file in sorted(files):
        parts = file.relative_to(root).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def room_of(module: str) -> str:
    """``argonne.tp.slices`` -> ``argonne.tp``; a door, ``scripts`` and ``tests`` are rooms by themselves."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "argonne" else parts[0]


def imported_names(source: str) -> Iterator[str]:
    """Every module that a source file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # "from argonne.tp import slices" names a module; "from model import ArgonneModel" does not
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_arrows(root: Path) -> list[tuple[str, str]]:
    """(importing module, imported module) for every import of one module of ours by another, sorted.

    A script is also found under its bare name, as scripts import each other.
    """
    files = module_files(root)
    known = {name: name for name in files}
    for name in files:
        if name.startswith("scripts."):
            known.setdefault(name.removeprefix("scripts."), name)
    found = set()
    for module, file in files.items():
        for name in imported_names(file.read_text(encoding="utf-8")):
            target = known.get(name)
            if target is not None and target != module and files[target].name != "__init__.py":
                found.add((module, target))
    return sorted(found)


def room_arrows(arrows: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """Room -> rooms that its modules import, itself left out."""
    rooms: dict[str, set[str]] = {}
    for module, target in arrows:
        rooms.setdefault(room_of(module), set()).add(room_of(target))
        rooms.setdefault(room_of(target), set())
    return {room: targets - {room} for room, targets in rooms.items()}


def floors(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """Room -> floor: 0 for a room that imports none, else one above the highest room that it imports.

    Raises ValueError for rooms that import each other in a circle.
    """
    found: dict[str, int] = {}
    while len(found) < len(rooms):
        ready = [room for room in rooms if room not in found and rooms[room] <= found.keys()]
        if not ready:
            circle = ", ".join(sorted(rooms.keys() - found.keys()))
            raise ValueError(f"these rooms import each other in a circle: {circle}")
        found |= {room: 1 + max((found[target] for target in rooms[room]), default=-1) for room in ready}
    return found
