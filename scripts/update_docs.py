#!/usr/bin/env python3
"""Write what the docs take from the code: the map of README.md, the table of docs/flags.md, the picture.

    python scripts/update_docs.py            # write them
    python scripts/update_docs.py --check    # write nothing; exit code 1 and the names of what is stale

The map is made of the first lines of the modules' docstrings, the table of the flags' own fields, the picture
(docs/architecture.svg) of the imports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from argonne.config.command_line import build_parser
from argonne.config.flags import flag_table
from argonne.errors import DataError
from argonne.tools.house_map import tree
from argonne.tools.house_picture import draw
from argonne.tools.script import OneLineParser, run_script

ROOT = Path(__file__).resolve().parent.parent


def with_section(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of a name; raises DataError where they are missing."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise DataError(f"the markers {begin.strip()} and {end} are missing: put them back")
    return before + begin + content + end + after


def generated(root: Path) -> dict[Path, str]:
    """File -> its whole text as it should be."""
    readme, flags = root / "README.md", root / "docs" / "flags.md"
    return {
        readme: with_section(readme.read_text(encoding="utf-8"), "map", f"```text\n{tree(root)}\n```\n"),
        flags: with_section(flags.read_text(encoding="utf-8"), "flags", flag_table(build_parser())),
        root / "docs" / "architecture.svg": draw(root),
    }


def stale(root: Path) -> list[Path]:
    """The files whose text is not what it should be."""
    wanted = generated(root)
    return [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OneLineParser("Write what the docs take from the code: map, flags, picture.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where one is stale")
    options = parser.parse_args(arguments)

    def work() -> str | None:
        old = stale(ROOT)
        names = ", ".join(str(path.relative_to(ROOT)) for path in old)
        if options.check:
            return f"{names}: stale: run scripts/update_docs.py" if old else None
        wanted = generated(ROOT)
        for path in old:
            path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {names}" if old else "nothing is stale")
        return None

    return run_script(work)


if __name__ == "__main__":
    sys.exit(main())
