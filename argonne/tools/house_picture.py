"""The picture of the rooms: boxes by floor, an arrow for each import between them, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from argonne.tools.house_map import DOORS, ROOMS
from argonne.tools.imports import floors, module_arrows, module_files, room_arrows, room_of

LOWEST = ("argonne.run", "argonne.tp", "model", "argonne.data")
"""The lowest floor from left to right; the floors above follow from it."""
GROUND = ("argonne.errors", "argonne.files")
WIDTH, MARGIN, BOX, BOX_HEIGHT, FLOOR = 1200, 30, 250, 62, 132
"""Pixels; FLOOR is the distance from one floor to the next."""
_INK, _FAINT, _EDGE = "#1f2430", "#9aa1ac", "#5b6472"
_FILL = {"door": "#fff7e0", "room": "#eef3fb", "ground": "#eef0f3"}
DOOR_WORDS = {
    "resume_pretrain_tensor": "the recipe",
    "model": "the plain model",
    "tp_shard": "the split as the run sees it",
    "data_stream": "tokens as the run sees them",
    "checkpointing": "checkpoints as the run sees them",
}


def suite_arrows(root: Path) -> dict[str, set[str]]:
    """Room -> rooms it imports, over the doors and rooms; the ground, which all may use, left out."""
    shown = {*DOORS, *ROOMS}
    arrows = room_arrows(module_arrows(root))
    return {room: arrows.get(room, set()) & shown for room in (*DOORS, *ROOMS)}


def reachable(arrows: Mapping[str, set[str]], room: str) -> set[str]:
    """Every room that ``room`` imports, directly or through others."""
    found: set[str] = set()
    waiting = list(arrows[room])
    while waiting:
        target = waiting.pop()
        if target not in found:
            found.add(target)
            waiting += arrows[target]
    return found


def main_arrows(arrows: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """The arrows that no longer way replaces (the transitive reduction)."""
    return {
        (room, target)
        for room, targets in arrows.items()
        for target in targets
        if not any(target in reachable(arrows, other) for other in targets - {target})
    }


def shown_floors(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """Room -> floor, each room just below the lowest one that imports it, so that arrows are short."""
    height = floors(arrows)
    for room in sorted(height, key=lambda room: -height[room]):
        importers = [height[other] for other in arrows if room in arrows[other]]
        if importers:
            height[room] = min(importers) - 1
    return height


def places(arrows: Mapping[str, set[str]]) -> dict[str, tuple[float, int]]:
    """Room -> (x of its centre, floor); on a floor each room stands near the middle of what it imports."""
    floor_of = shown_floors(arrows)
    found: dict[str, tuple[float, int]] = {}
    for floor in range(max(floor_of.values()) + 1):
        rooms = [room for room in arrows if floor_of[room] == floor]

        def wish(room: str) -> float:
            below = sorted(found[target][0] for target in arrows[room])
            if below:
                return sum(below) / len(below)
            return LOWEST.index(room) if room in LOWEST else 0

        rooms.sort(key=wish)
        step = (WIDTH - 2 * MARGIN) / len(rooms)
        for index, room in enumerate(rooms):
            found[room] = (MARGIN + step * (index + 0.5), floor)
    return found


def _box(x: float, y: float, width: float, kind: str, name: str, words: str) -> str:
    left, middle = x - width / 2, y + BOX_HEIGHT / 2
    return (
        f'<rect x="{left:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="7" '
        f'fill="{_FILL[kind]}" stroke="{_EDGE}"/>\n'
        f'<text x="{x:.0f}" y="{middle - 4:.0f}" font-size="15" font-weight="bold">{escape(name)}</text>\n'
        f'<text x="{x:.0f}" y="{middle + 16:.0f}" font-size="11" fill="{_EDGE}">{escape(words)}</text>\n'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], *, main: bool) -> str:
    """A curve from the lower edge of one box to the upper edge of another."""
    (x, y), (to_x, to_y) = start, end
    bend = 0.45 * (to_y - y)
    color, width, marker = (_INK, 1.5, "main") if main else (_FAINT, 0.9, "faint")
    bends = f"{x:.0f},{y + bend:.0f} {to_x:.0f},{to_y - bend:.0f}"
    return (
        f'<path d="M{x:.0f},{y:.0f} C{bends} {to_x:.0f},{to_y:.0f}" fill="none" '
        f'stroke="{color}" stroke-width="{width}" marker-end="url(#{marker})"/>\n'
    )


def _marker(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0,1 L10,5 L0,9 z" fill="{color}"/></marker>\n'
    )


def _spread(count: int, index: int, width: float) -> float:
    """Where the index-th of ``count`` arrows meets an edge of ``width``, from its middle."""
    return width * ((index + 0.5) / count - 0.5)


def draw(root: Path) -> str:
    """The SVG text; it depends on the imports alone, so equal trees give equal bytes."""
    arrows = suite_arrows(root)
    at, important = places(arrows), main_arrows(arrows)
    top = max(floor for _, floor in at.values())
    height = MARGIN * 2 + 40 + FLOOR * top + BOX_HEIGHT + 110

    def y_of(floor: int) -> float:
        return MARGIN + 40 + FLOOR * (top - floor)

    width = BOX * 0.8
    curves = []
    for room, targets in arrows.items():
        leaving = sorted(targets, key=lambda target: (at[target][0], target))
        for index, target in enumerate(leaving):
            arriving = sorted((r for r in arrows if target in arrows[r]), key=lambda r: (at[r][0], r))
            start = (at[room][0] + _spread(len(leaving), index, width), y_of(at[room][1]) + BOX_HEIGHT)
            x = at[target][0] + _spread(len(arriving), arriving.index(room), width)
            main = (room, target) in important
            curves.append((main, _arrow(start, (x, y_of(at[target][1])), main=main)))
    counts: dict[str, int] = {}
    for module, file in module_files(root).items():
        if file.name != "__init__.py":
            counts[room_of(module)] = counts.get(room_of(module), 0) + 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" text-anchor="middle" fill="{_INK}">\n',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n<defs>\n',
        _marker("main", _INK) + _marker("faint", _FAINT) + "</defs>\n",
        f'<text x="{MARGIN}" y="{MARGIN + 8}" font-size="17" font-weight="bold" text-anchor="start">'
        "Who imports whom</text>\n",
        f'<text x="{MARGIN}" y="{MARGIN + 28}" font-size="12" text-anchor="start" fill="{_EDGE}">'
        "Every arrow points down. Yellow: doors. Grey: an import that a longer way implies too.</text>\n",
    ]
    parts += [curve for _, curve in sorted(curves)]  # the faint ones first, below the others
    for room, (x, floor) in at.items():
        if room in ROOMS:
            name = room.replace(".", "/")
            parts.append(_box(x, y_of(floor), BOX, "room", name, f"{ROOMS[room]} ({counts[room]} files)"))
        else:
            parts.append(_box(x, y_of(floor), BOX, "door", f"{room}.py", DOOR_WORDS[room]))
    words = "ground: every room but the model may import it"
    name = "argonne/errors.py, argonne/files.py"
    parts.append(_box(WIDTH / 2, y_of(0) + FLOOR - 12, WIDTH - 2 * MARGIN, "ground", name, words))
    return "".join([*parts, "</svg>\n"])
