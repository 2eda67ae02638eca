"""What an installation adds to site-packages: the five doors and the package, and every module of it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from argonne.tools.house_map import DOORS
from tests import ROOT

BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_wheel(sys.argv[1]))
"""


def test_a_wheel_installs_six_names(tmp_path: Path) -> None:
    """Built by setuptools itself, as pip does, from a copy of what git tracks (no network, no isolation)."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in files} == {*(f"{door}.py" for door in DOORS), "argonne"}
    modules = {name for name in tracked() if name.startswith("argonne/") and name.endswith(".py")}
    assert {name for name in files if name.startswith("argonne/")} == modules


def tracked() -> list[str]:
    """The files of the checkout that belong to an installation; by name, where git is not at hand."""
    files = [*ROOT.glob("*.py"), *(ROOT / "argonne").rglob("*.py"), ROOT / "pyproject.toml"]
    return [str(path.relative_to(ROOT)) for path in [*files, ROOT / "README.md", ROOT / "LICENSE"]]
