"""scripts/branch_run.py: a branch shares its checkpoint and records, and goes its own way from there."""

import json
import os
import shutil
import tomllib
from pathlib import Path

import branch_run
import compare_runs
import pytest

from argonne.files import OutputFolder
from argonne.testing.launch import checkpoint, launch, metrics
from tests.scripts.conftest import FinishedRun

COOLDOWN = ["--total-steps", "8", "--cooldown-steps", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_cooldown_branch_trains_on_and_differs_where_it_was_changed(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new = finished_run.folder, tmp_path / "new"
    before = contents(run)
    assert branch_run.main([str(run), str(new), "--step", "6", *COOLDOWN]) == 0
    said = capsys.readouterr().out
    assert "changed: --total-steps: 9 -> 8" in said
    config = OutputFolder(new).run_config
    assert said.splitlines()[-1].endswith(f"--nproc_per_node=1 resume_pretrain_tensor.py --config {config}")
    assert os.path.samefile(checkpoint(run, 6), checkpoint(new, 6))
    assert metrics(new) == metrics(run)[:6]
    evaluations = [json.loads(line)["step"] for line in OutputFolder(new).eval_metrics.open()]
    assert evaluations == [3, 6]
    origin = json.loads((OutputFolder(new).stats / "branch.json").read_text())
    assert (origin["run"], origin["step"]) == (str(run), 6)
    assert origin["changed"] == {"--total-steps": [9, 8]}
    assert tomllib.loads(config.read_text())["total-steps"] == 8

    done = launch(1, "--config", config)
    assert done.code == 0, done.stderr
    assert [record["step"] for record in metrics(new)] == list(range(1, 9))
    assert metrics(new)[6]["loss"] == metrics(run)[6]["loss"]
    assert compare_runs.main([str(run), str(new)]) == 1
    assert "error: the runs differ: step 8, lr: 0.003 " in capsys.readouterr().err
    assert contents(run) == before


def test_a_copy_where_the_filesystem_makes_no_hard_link(
    finished_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    new = tmp_path / "new"
    assert branch_run.main([str(finished_run.folder), str(new), "--step", "3"]) == 0
    assert "step_3.pth was copied: the filesystem makes no hard link (Invalid" in capsys.readouterr().out
    one, other = checkpoint(finished_run.folder, 3), checkpoint(new, 3)
    assert one.read_bytes() == other.read_bytes() and not os.path.samefile(one, other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "5"], "keeps no checkpoint of step 5 (--step): kept are 3, 6, 9"),
        (["--step", "3", "--output-dir", "x"], "--output-dir is not for a branch"),
        (["--step", "3", "--checkpoint-path", "NONE"], "--checkpoint-path is not for a branch"),
    ],
)
def test_mistakes(
    arguments: list[str],
    said: str,
    finished_run: FinishedRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert branch_run.main([str(finished_run.folder), str(tmp_path / "new"), *arguments]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_spoiled_checkpoint_and_a_used_folder_are_refused(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(finished_run.folder, run)
    path = checkpoint(run, 6)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert branch_run.main([str(run), str(new), "--step", "6"]) == 1
    assert str(path) in capsys.readouterr().err and [run] == list(tmp_path.iterdir())
    assert branch_run.main([str(run), str(run), "--step", "3"]) == 2
    assert f"error: {run} holds a run: give a new folder" in capsys.readouterr().err


def test_a_run_without_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert branch_run.main([str(tmp_path / "none"), str(tmp_path / "new"), "--step", "3"]) == 2
    assert "error: " in capsys.readouterr().err
