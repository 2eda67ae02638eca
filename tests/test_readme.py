"""The README's flags are the parser's, its files exist, and its map of modules is whole."""

import re

from argonne.config.command_line import build_parser
from argonne.config.flags import flag_table
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_flags_are_the_parsers() -> None:
    shown = README.split("<!-- flags: begin -->\n")[1].split("<!-- flags: end -->")[0]
    assert shown == flag_table(build_parser())


def test_every_module_is_on_the_map() -> None:
    table = README.split("## Where things are")[1].split("Imports point")[0]
    mapped = set(re.findall(r"`(\w+)\.py`", table))
    assert mapped == {path.stem for path in ROOT.glob("*.py")}


def test_every_script_named_is_there() -> None:
    named = set(re.findall(r"scripts/[\w.]+\.\w+", README))
    assert named and all((ROOT / name).is_file() for name in named)
