"""--final-model-dir: what is refused before training, and the export at the end."""

from pathlib import Path
from typing import Any

import pytest

from argonne.config.options import DataOptions, RunConfig
from argonne.config.run_options import CheckpointOptions, OutputOptions
from argonne.errors import ConfigError, DeviceError
from argonne.training.final_model import check_final_model_dir, export_if_asked
from tests.training.small_run import control_and_report, run_config
from tests.training.test_setup import ALONE


def asking_for(target: Path, root: Path, **groups: Any) -> RunConfig:
    """A run in root/run, whose folders are there."""
    control_and_report(root / "run")
    output = OutputOptions(output_dir=str(root / "run"), final_model_dir=str(target))
    return run_config(root / "run", output=output, **groups)


def make_export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "modeling_argonne.py").touch()
    (folder / "config.json").touch()
    return folder


def test_folders_that_an_export_may_take(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_export(tmp_path / "earlier")
    before = sorted(tmp_path.rglob("*"))
    for name in ("empty", "earlier", "new", "run/model"):
        check_final_model_dir(asking_for(tmp_path / name, tmp_path))
    check_final_model_dir(run_config(tmp_path))
    left = {path for path in tmp_path.rglob("*") if "run" not in path.parts}
    assert left == set(before)  # nothing stays behind of the check


def test_what_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"--final-model-dir .*mine is not empty and not an earlier export"):
        check_final_model_dir(asking_for(tmp_path / "mine", tmp_path))
    with pytest.raises(ConfigError, match=r"--final-model-dir .*thesis.txt is a file"):
        check_final_model_dir(asking_for(tmp_path / "mine" / "thesis.txt", tmp_path))


@pytest.mark.parametrize("name", [".", "pretrained", "stats"])
def test_the_runs_own_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--final-model-dir .* \(--output-dir\), which the export"):
        check_final_model_dir(asking_for(tmp_path / "run" / name, tmp_path))


def test_a_folder_that_holds_another_of_the_run(tmp_path: Path) -> None:
    """Also where it is an earlier export, and under another name."""
    root = make_export(tmp_path / "export")
    with pytest.raises(ConfigError, match=r"is or holds .*run \(--output-dir\)"):
        check_final_model_dir(asking_for(root, root))
    (tmp_path / "link").symlink_to(root)
    data = DataOptions(tokenizer_path=str(root))
    with pytest.raises(ConfigError, match=r"link is or holds .*export \(--tokenizer-path\)"):
        check_final_model_dir(asking_for(tmp_path / "link", tmp_path, data=data))
    saved = CheckpointOptions(checkpoint_path=str(root / "config.json"))
    with pytest.raises(ConfigError, match=r"config.json \(--checkpoint-path\)"):
        check_final_model_dir(asking_for(root, tmp_path, checkpoint=saved))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "model", Path("/proc/nowhere/model"), tmp_path / ("x" * 300)):
        with pytest.raises(DeviceError, match=r"--final-model-dir .* cannot be made or written \(\w.*choose"):
            check_final_model_dir(asking_for(target, tmp_path))


def test_no_export_without_a_folder_or_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control, report = control_and_report(tmp_path)
    exported: list[Path] = []
    monkeypatch.setattr("argonne.training.final_model.export_hf", lambda *args, **_: exported.append(args[3]))
    monkeypatch.setattr("argonne.training.final_model.verify_checkpoint", lambda path: path)
    target = tmp_path / "model"
    asked = run_config(tmp_path, output=OutputOptions(output_dir=str(tmp_path), final_model_dir=str(target)))
    export_if_asked(run_config(tmp_path), tmp_path / "c.pth", {}, ALONE, control, report)
    export_if_asked(asked, None, {}, ALONE, control, report)
    assert exported == []
    export_if_asked(asked, tmp_path / "c.pth", {}, ALONE, control, report)
    assert exported == [target] and control.progress.phase == "start"
