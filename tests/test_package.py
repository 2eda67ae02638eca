"""What the package declares: its modules and the versions it was tested with."""

import tomllib

from packaging.requirements import Requirement

from tests import ROOT
from tests.conftest import LIBRARY_TESTS

NEEDED = ["--tokenizer-path", "tok"]


def test_the_package_lists_every_module() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(package["tool"]["setuptools"]["py-modules"]) == sorted(
        path.stem for path in ROOT.glob("*.py")
    )


def test_constraints_hold_what_the_package_requires() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    names = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    groups = package["optional-dependencies"]
    extras = [name for key, group in groups.items() if key != "eval" for name in group]  # no test installs it
    for line in package["dependencies"] + extras:
        requirement = Requirement(line)
        assert requirement.specifier.contains(names[requirement.name]), line


def test_every_lower_bound_names_one_version() -> None:
    """`run_tests.sh --oldest` installs just these, and transformers 6 takes away what is used here."""
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for group in package["optional-dependencies"].values() for name in group]
    for line in package["dependencies"] + extras:
        assert line.split(",")[0].count(">=") == 1 and line.split(",")[0].count(".") == 2, line
    bounds = {Requirement(line).name: Requirement(line).specifier for line in package["dependencies"]}
    assert not bounds["transformers"].contains("6.0.0")


def test_library_tests_are_there() -> None:
    assert all((ROOT / name).is_file() for name in LIBRARY_TESTS)
