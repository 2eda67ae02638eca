"""The libraries of this environment against the ranges that the package declares, and is tested with."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

PACKAGE = "argonne-tensor-parallel"
_CHECKOUT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def declared_ranges(checkout: Path = _CHECKOUT) -> list[str]:
    """Requirements such as ``torch>=2.10.0,<2.15``: a checkout's own, else those of the installed package.

    An editable installation's metadata is as old as the installation. Empty where neither is to be found.
    """
    if checkout.is_file():
        with checkout.open("rb") as file:
            project = tomllib.load(file).get("project", {})
        if project.get("name") == PACKAGE:
            return list(project["dependencies"])
    try:
        required = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    return [line for line in required if "extra ==" not in line]


def outside_range(
    requirements: Iterable[str] | None = None, version_of: Callable[[str], str] = metadata.version
) -> str | None:
    """One line naming every library whose version the package was not tested with; None where all fit.

    A local part (``2.13.0+cpu``) does not count; a library that is not installed is the import's to report.
    """
    from packaging.requirements import Requirement

    found = []
    for line in declared_ranges() if requirements is None else requirements:
        requirement = Requirement(line)
        try:
            version = version_of(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} ({requirement.specifier})")
    if not found:
        return None
    return f"not tested with {', '.join(found)}: install versions in these ranges if something goes wrong"
