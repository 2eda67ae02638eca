"""A library outside the declared range is named in one line at the start."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from argonne.ranks.libraries import PACKAGE, declared_ranges, outside_range
from tests import ROOT

VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.3.0", "numpy": "2.4.6"}


def version_of(name: str) -> str:
    if name not in VERSIONS:
        raise metadata.PackageNotFoundError(name)
    return VERSIONS[name]


@pytest.mark.libraries
def test_the_versions_at_hand_are_inside() -> None:
    assert outside_range() is None


@pytest.mark.parametrize(
    ("requirements", "named"),
    [
        (["torch>=2.10.0,<2.15", "transformers>=5.4.0,<6"], "transformers 5.3.0 (<6,>=5.4.0)"),
        (["torch<2.13", "numpy>=2.0"], "torch 2.13.0+cpu (<2.13)"),
        (["numpy<2", "transformers>=6"], "numpy 2.4.6 (<2), transformers 5.3.0 (>=6)"),
    ],
)
def test_a_version_outside_is_one_line(requirements: list[str], named: str) -> None:
    line = outside_range(requirements, version_of)
    assert line is not None and line.startswith(f"not tested with {named}: ") and "\n" not in line


def test_inside_or_absent_says_nothing() -> None:
    assert outside_range(["torch>=2.13", "numpy>=2.0.0", "unheard-of>=1"], version_of) is None


def test_the_ranges_are_the_packages(tmp_path: Path) -> None:
    """A checkout's own; without one, those of the installation, extras aside."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == PACKAGE
    assert declared_ranges() == project["dependencies"]
    assert not any("pytest" in line for line in declared_ranges(tmp_path / "pyproject.toml"))


def test_a_start_warns_once_and_on_rank_0_only(tmp_path: Path) -> None:
    program = (
        "import argonne.ranks.libraries as libraries\n"
        "libraries.declared_ranges = lambda: ['numpy<1']\n"
        "import resume_pretrain_tensor as entry\n"
        "entry.main(['--tokenizer-path', 'nowhere', '--data-glob', 'none', '--output-dir', 'out'])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert ended.stderr.count("warning: not tested with numpy") == 1, ended.stderr
