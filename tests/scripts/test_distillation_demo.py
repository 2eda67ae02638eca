"""The demonstration: its arithmetic, its picture, and (slow) that a teacher makes students faster."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.testing.launch import environment
from argonne.tools.distillation_demo import ALONE, TAUGHT, Curve, Outcome, draw, mean_and_error, steps_to
from tests import ROOT

CURVES: dict[str, list[Curve]] = {
    ALONE: [[(25, 4.0), (50, 3.0), (75, 2.0)], [(25, 4.0), (50, 3.5), (75, 2.5)]],
    TAUGHT: [[(25, 3.0), (50, 2.0), (75, 1.0)], [(25, 2.5), (50, 2.75), (75, 1.5)]],
}


def test_steps_to_a_loss() -> None:
    curve: Curve = [(25, 4.0), (50, 3.0), (75, 2.0)]
    assert [steps_to(curve, loss) for loss in (3.0, 2.5, 2.0)] == [50, 62.5, 75]
    assert steps_to(curve, 1.9) == math.inf
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))


def test_the_outcome_compares_at_a_loss_that_all_reach(tmp_path: Path) -> None:
    outcome = Outcome.of(CURVES, teacher_loss=0.5)
    assert outcome.loss == 2.5 and outcome.steps[ALONE] == [62.5, 75]
    assert outcome.steps[TAUGHT] == [37.5, 55]
    assert "| alone | 69 ± 6 | 62, 75 | 2.250 ± 0.250 |" in outcome.table()
    pytest.importorskip("matplotlib")
    assert draw(CURVES, outcome, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<svg") == 1 and len(re.findall("<path", text)) > 8


@pytest.mark.parametrize("flags", [["--seeds", "1"], ["--steps", "60"], ["--steps", "25"]])
def test_wrong_flags(flags: list[str], tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "distillation_demo.py")
    done = subprocess.run(
        [sys.executable, script, "--output-dir", str(tmp_path / "out"), *flags],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(f"error: {flags[0]}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_teacher_makes_students_faster(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "distillation_demo.py")
    command = [
        sys.executable,
        script,
        "--output-dir",
        str(tmp_path),
        "--steps",
        "150",
        "--teacher-steps",
        "300",
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    curves = json.loads((tmp_path / "curves.json").read_text())
    outcome = Outcome.of(curves, 0.0)
    assert len(outcome.steps[TAUGHT]) == 3
    assert max(outcome.steps[TAUGHT]) < min(outcome.steps[ALONE])
    again = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:] and "steps ..." not in again.stdout
