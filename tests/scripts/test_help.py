"""Every command answers --help from any folder, and says what it is for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

PARTS = {"launch_common.sh"}
"""Sourced by the launchers, not run."""
COMMANDS = sorted(
    path.name
    for path in (ROOT / "scripts").iterdir()
    if path.suffix in (".py", ".sh") and path.name not in PARTS
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_from_any_folder(name: str, tmp_path: Path) -> None:
    path = ROOT / "scripts" / name
    interpreter = sys.executable if path.suffix == ".py" else "bash"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    finished = subprocess.run(
        [interpreter, str(path), "--help"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0 and not finished.stderr, finished.stderr
    assert len(finished.stdout.splitlines()) >= 3 and name in finished.stdout.replace(
        "resume_pretrain_tensor.py", "check_flags.py"
    )
    assert not list(tmp_path.iterdir())


def test_only_commands_and_what_they_source_are_in_scripts() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"), path.name


def test_sound_and_wrong_flags_without_a_run(tmp_path: Path) -> None:
    def check(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "check_flags.py"), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert check("--tokenizer-path", "any").returncode == 0
    wrong = check("--batch-size", "0")
    assert wrong.returncode == 2
    assert [line[:7] for line in wrong.stderr.splitlines()] == ["error: "] * 2
    assert not list(tmp_path.iterdir())
