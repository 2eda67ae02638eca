"""How every script ends: one line for an error, its exit code, and not a word to a reader that has left."""

import re
import subprocess
import sys

import pytest

from argonne.errors import ConfigError, RunError
from argonne.testing.launch import ROOT, environment
from argonne.tools.script import run_script, said_by_rank_0

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

ENDING = """
import sys
sys.path[:0] = [{root!r}, {scripts!r}]
from argonne.tools.script import run_script
sys.exit(run_script(lambda: print("x" * {size})))
"""


def leave_early(*command: str) -> tuple[int, str]:
    """Run a program whose reader leaves at once; its exit code and what it says on stderr."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONUNBUFFERED": ""},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    return process.wait(timeout=60), told


@pytest.mark.parametrize("size", [1, 1_000_000])  # fits the buffer, does not
def test_a_reader_that_leaves_ends_the_script_without_a_word(size: int) -> None:
    program = ENDING.format(root=str(ROOT), scripts=str(ROOT / "scripts"), size=size)
    assert leave_early("-c", program) == (141, "")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["visualize_architecture.py", "--model", "argonne-tiny", "--tp", "2"], 141),
        pytest.param(
            ["verify_tensor_parallel.py", "--batch-size", "1", "--seq-len", "9"], 141, marks=pytest.mark.slow
        ),
        # Its ranks end the lesson together.
        pytest.param(["tensor_parallel_practice.py"], 0, marks=pytest.mark.slow),
    ],
)
def test_long_output_into_head(command: list[str], code: int) -> None:
    assert leave_early(str(ROOT / "scripts" / command[0]), *command[1:]) == (code, "")


def test_errors_are_one_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise ConfigError("--flag 3: give 4")

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_script(wrong) == 2
    assert capsys.readouterr().err == "error: --flag 3: give 4\n"
    with pytest.raises(RunError):
        run_script(wrong, debug=True)
    assert run_script(lambda: "2 and 2 are 5") == 1
    assert capsys.readouterr().err == "error: 2 and 2 are 5\n"
    assert run_script(interrupted) == 130 and run_script(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_a_script_with_process_groups_ends_without_their_threads() -> None:
    """C++ may abort (-6) a process whose interpreter ends under gloo's threads."""
    joins = re.compile(r"init_process_group\(|world import .*connect|import .*join$|make_targets\(", re.M)
    joining = {path.name: text for path in SCRIPTS if joins.search(text := path.read_text("utf-8"))}
    for name in ("generate.py", "replay_step.py", "teacher_targets.py", "verify_tensor_parallel.py"):
        assert name in joining
    assert [name for name, text in joining.items() if not re.search(r"\b(end_with|leave)\(", text)] == []


def test_an_error_of_all_ranks_is_said_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("argonne.tools.script.time.sleep", slept.append)
    with pytest.raises(ConfigError), said_by_rank_0(0):
        raise ConfigError("--flag 3: give 4")
    assert slept == []
    with pytest.raises(SystemExit) as ended, said_by_rank_0(1):
        raise ConfigError("--flag 3: give 4")
    assert ended.value.code == 2 and slept == [2.0]
