"""scripts/branch_run.py: a branch shares its checkpoint and records, and goes its own way from there."""

import json
import os
import shutil
import tomllib
from pathlib import Path

import branch_run
import compare_runs
import find_document
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


@pytest.mark.slow
def test_a_branch_without_documents_begins_before_them(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, listed = finished_run.folder, tmp_path / "list"
    before = contents(run)
    seen = {}
    for row in range(6):
        assert find_document.main([str(run), "--document", f"000_00000.parquet:{row}"]) == 0
        said = capsys.readouterr().out
        if "seen in steps" in said:
            kept = said.split("checkpoints without it: ")[1].split()
            seen[row] = 0 if kept == ["none"] else int(kept[-1].rstrip(","))
    row = next(row for row, last in seen.items() if last == 3)
    arguments = [str(run), "--document", f"000_00000.parquet:{row}", "--exclude-list", str(listed)]
    assert find_document.main(arguments) == 0
    assert f"{listed}: 1 documents added, 0 were there" in capsys.readouterr().out
    assert find_document.main(arguments) == 0
    assert "0 documents added, 1 were there" in capsys.readouterr().out
    new, flags = tmp_path / "new", ["--exclude-documents", str(listed)]
    assert branch_run.main([str(run), str(new), *flags]) == 0
    said = capsys.readouterr().out
    assert f"{new}: a branch of {run} at step 3" in said
    assert f'changed: --exclude-documents: not given -> "{listed}"' in said
    done = launch(1, "--config", OutputFolder(new).run_config)
    assert done.code == 0 and "excluded documents: 0 -> 1" in done.stderr, done.stderr
    assert "Excluded: 1 document (--exclude-documents), passed over so far: 0" in done.stdout
    assert metrics(new)[-1]["excluded_rows"] == 1
    assert contents(run) == before

    assert branch_run.main([str(run), str(tmp_path / "other"), "--step", "6", *flags]) == 1
    error = capsys.readouterr().err
    assert f"--step 6: its checkpoint had seen 000_00000.parquet row {row}" in error
    assert "give --step 3" in error
    listed.write_text("000_00000.parquet:0\n")
    assert branch_run.main([str(run), str(tmp_path / "other"), *flags]) == 1
    assert "every checkpoint" in capsys.readouterr().err and not (tmp_path / "other").exists()
    resumed = launch(1, "--config", OutputFolder(new).run_config, "--total-steps", 12, *flags)
    assert resumed.code == 1
    assert resumed.errors() == [
        "error: --exclude-documents names 000_00000.parquet row 0, which the run has trained on, and no "
        f"checkpoint in {new}/pretrained is from before: start anew with the list, or --allow-data-change to "
        "leave it out from here on"
    ]
