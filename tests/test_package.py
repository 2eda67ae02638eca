"""What the package declares: its modules and the versions it was tested with."""

import tomllib

from tests import ROOT

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
    extras = [name for group in package["optional-dependencies"].values() for name in group]
    for requirement in package["dependencies"] + extras:
        name, least = requirement.split(">=")
        version = [int(part) for part in names[name].split(".")[:2]]
        assert version >= [int(part) for part in least.split(".")], requirement
