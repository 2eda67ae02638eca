"""What the docs say: files, links and names exist, what is generated is fresh, how-tos do what they say."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from update_docs import generated, stale

from argonne.tools.house_map import DOORS, ROOMS, WORKSHOPS, tree
from argonne.tp.architectures import PLANS
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def test_nothing_that_is_generated_is_stale() -> None:
    assert [path.name for path in stale(ROOT)] == [], "run scripts/update_docs.py"


def test_the_map_names_every_file_of_the_suite() -> None:
    shown = set(re.findall(r"(\w+)\.py", tree(ROOT)))
    files = [*ROOT.glob("*.py"), *(ROOT / "argonne").glob("[!_]*.py")]
    for room in ROOMS:
        files += (ROOT / room.replace(".", "/")).glob("[!_]*.py")
    assert {file.stem for file in files} <= shown
    folders = {f"argonne.{path.parent.name}" for path in (ROOT / "argonne").glob("*/__init__.py")}
    assert folders == {*ROOMS, *WORKSHOPS} and len(DOORS) == 5
    assert all(len(line.split(maxsplit=1)) == 2 for line in tree(ROOT).splitlines() if ".py" in line)


def test_a_changed_docstring_makes_the_map_stale(tmp_path: Path) -> None:
    copy = copy_of(tmp_path)
    assert stale(copy) == []
    door = copy / "model.py"
    door.write_text(door.read_text().replace('"""', '"""Planted words. ', 1))
    assert [path.name for path in stale(copy)] == ["README.md"]
    assert "model.py                          Planted words" in generated(copy)[copy / "README.md"]


def test_the_readme_is_short() -> None:
    assert README.count("\n") < 250
    assert [line for line in README.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for name in re.findall(r"\b(?:scripts|tests|argonne|docs|recipes)/[\w./]+\.\w+", text):
        assert (ROOT / name).exists() or page.name == "CHANGELOG.md", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_code_exist(page: Path) -> None:
    """`argonne.tp.slices.SliceMap.owned`, `tp_shard.shard_tensor_parallel`: each is a module or in one."""
    roots = "|".join(("argonne", *DOORS))
    for name in re.findall(rf"`((?:{roots})(?:\.\w+)+)`", page.read_text(encoding="utf-8")):
        if name.endswith((".py", ".md")):
            continue
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            for part in parts[count:]:
                assert hasattr(found, part), name
                found = getattr(found, part)
            break
        else:
            raise AssertionError(name)


def copy_of(tmp_path: Path) -> Path:
    """The suite, its scripts and docs, to be changed."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "tests", "pretrained", "stats", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def run_in(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True, timeout=120)


def test_howto_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, run as it stands; its own assertions compare the split model with transformers' model."""
    monkeypatch.setattr("builtins.print", lambda *_: None)
    blocks = code_blocks("howto_architecture.md", "python")
    before = dict(PLANS)
    torch.manual_seed(0)
    try:
        exec("\n".join(blocks), {"__name__": "howto"})
        assert set(PLANS) - set(before) == {"arcee"}
    finally:
        PLANS.clear()
        PLANS.update(before)


def test_howto_flag(tmp_path: Path) -> None:
    """Its field, put into a copy of the suite, gives what the page promises."""
    copy = copy_of(tmp_path)
    (field,) = code_blocks("howto_flag.md", "python")
    path = copy / "argonne" / "config" / "options.py"
    lines = path.read_text().splitlines(keepends=True)
    (owner,) = (
        node
        for node in ast.parse("".join(lines)).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingOptions"
    )
    assert owner.end_lineno is not None
    lines.insert(owner.end_lineno, field)
    path.write_text("".join(lines))

    (shell,) = code_blocks("howto_flag.md", "bash")
    docs, shown, refused = (run_in(copy, *line.split()[1:]) for line in shell.splitlines())
    assert docs.returncode == 0 and "flags.md" in docs.stdout
    row = "| `--adam-epsilon X` | 1e-08 | added to the root in AdamW's update |"
    assert row in (copy / "docs" / "flags.md").read_text()
    assert shown.returncode == 0 and "--adam-epsilon X" in shown.stdout and "1e-08" in shown.stdout
    (said,) = (text for text in code_blocks("howto_flag.md", "text") if text.startswith("error"))
    assert refused.returncode == 2 and refused.stderr == said
    assert run_in(copy, "scripts/update_docs.py", "--check").returncode == 0


def test_howto_data_format(tmp_path: Path) -> None:
    """Its reader and its line, put into a copy of the suite, read what pyarrow wrote."""
    copy = copy_of(tmp_path)
    reader, branch, check = code_blocks("howto_data_format.md", "python")
    path = copy / "argonne" / "data" / "formats.py"
    text = path.read_text()
    before = "    is_arrow = "
    assert text.count(before) == 1
    path.write_text(text.replace(before, branch + before))
    (copy / "argonne" / "data" / "orc_reader.py").write_text(reader)
    script = copy / "check.py"
    script.write_text(check)
    finished = run_in(copy, "check.py", str(tmp_path))
    assert finished.returncode == 0 and finished.stdout == "the same rows\n", finished.stderr
