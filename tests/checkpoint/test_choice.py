"""Which checkpoint a run resumes from."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from argonne.errors import CheckpointError, DeviceError
from argonne.testing.checkpoint_samples import save_sample
from checkpointing import (
    checkpoint_path,
    choose_checkpoint,
    require_safe_torch,
)
from tests import FIXTURES
from tests.checkpoint.odd_files import damage


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """An output folder whose newest checkpoint by step (11) is not its newest by time."""
    folder = tmp_path / "out" / "pretrained"
    for step in (9, 11, 10):
        save_sample(folder, step)
    for age, step in enumerate((11, 10, 9)):
        os.utime(checkpoint_path(folder, step), (1e9 - age, 1e9 - age))
    return tmp_path / "out"


def test_the_newest_step_is_taken_whatever_the_clock_says(output_dir: Path) -> None:
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and choice.reader.step == 11 and choice.warnings == ()
    assert choice.reason.startswith("resuming from") and "(step 11)" in choice.reason


def test_a_damaged_newest_is_passed_over_with_the_reason(output_dir: Path) -> None:
    damage(checkpoint_path(output_dir / "pretrained", 11))
    checkpoint_path(output_dir / "pretrained", 12).write_bytes(b"")
    for requested in (None, str(output_dir / "pretrained"), str(output_dir)):
        choice = choose_checkpoint(requested, output_dir)
        assert choice.reader is not None and choice.reader.step == 10
        empty, flipped = choice.warnings
        assert "step_12.pth: the file is empty (0 bytes)" in empty
        assert "step_11.pth: record archive/data/" in flipped and "does not match its checksum" in flipped


def test_a_named_damaged_file_is_an_error(output_dir: Path) -> None:
    path = checkpoint_path(output_dir / "pretrained", 11)
    damage(path)
    with pytest.raises(CheckpointError, match=r"does not match its checksum"):
        choose_checkpoint(str(path), output_dir)


def test_when_none_can_be_loaded_it_is_an_error_and_never_step_0(output_dir: Path) -> None:
    for step in (9, 10, 11):
        damage(checkpoint_path(output_dir / "pretrained", step))
    for requested in (None, str(output_dir / "pretrained"), str(output_dir)):
        with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* can be loaded"):
            choose_checkpoint(requested, output_dir)


def test_a_restart_goes_on_from_the_newest_that_its_launch_wrote(output_dir: Path) -> None:
    folder = output_dir / "pretrained"
    for first in ({"requested": "NONE"}, {"requested": str(checkpoint_path(folder, 9))}):
        choice = choose_checkpoint(
            first["requested"], output_dir, written_before=checkpoint_path(folder, 10)
        )  # 11 is another run's
        assert choice.reader is not None and choice.reader.step == 10
    damage(checkpoint_path(folder, 10))
    choice = choose_checkpoint(
        None, output_dir, force_from_scratch=True, written_before=checkpoint_path(folder, 10)
    )
    assert choice.reader is not None and choice.reader.step == 9 and "step_10.pth" in choice.warnings[0]
    elsewhere = choose_checkpoint("NONE", output_dir, written_before=output_dir / "other" / "x.pth")
    assert elsewhere.reader is None


def test_from_scratch_only_when_nothing_is_there_or_asked(output_dir: Path, tmp_path: Path) -> None:
    assert choose_checkpoint("NONE", output_dir).reader is None
    assert choose_checkpoint(None, output_dir, force_from_scratch=True).reader is None
    fresh = choose_checkpoint(None, tmp_path / "fresh")
    assert fresh.reader is None and "no checkpoint in" in fresh.reason and "from scratch" in fresh.reason


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("nowhere.pth", "nowhere.pth does not exist"),
        ("empty", "empty holds no checkpoint"),
        ("none", "does not"),
    ],
)
def test_a_wrong_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requested: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        choose_checkpoint(requested, tmp_path)


def test_pipeline_names_are_recognised_beside_ours(output_dir: Path) -> None:
    folder = output_dir / "pretrained"
    shutil.copy(FIXTURES / "streaming_checkpoint_step_25.pth", folder)
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and (choice.reader.step, choice.reader.kind) == (25, "pipeline")
    shutil.copy(
        FIXTURES / "streaming_checkpoint_step_40.pth", folder / "non_streaming_checkpoint_step_40.pth"
    )
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and choice.reader.step == 40


def test_a_link_that_leaves_the_folder_is_passed_over(output_dir: Path, tmp_path: Path) -> None:
    outside, _ = save_sample(tmp_path / "outside", 30)
    (output_dir / "pretrained" / outside.name).symlink_to(outside)
    choice = choose_checkpoint(None, output_dir)
    assert choice.reader is not None and choice.reader.step == 11
    assert "is a link that leaves its folder" in choice.warnings[0]


def test_torch_versions_with_known_holes_are_refused() -> None:
    require_safe_torch(torch.__version__)
    for version in ("2.9.1", "2.6.0+cu124", "1.13.1", "weird"):
        with pytest.raises(DeviceError, match=r"install torch 2\.10 or newer"):
            require_safe_torch(version)
    for version in ("2.10.0", "2.13.0+cpu", "3.0"):
        require_safe_torch(version)


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("model.safetensors", ["model.safetensors"]),
        (".", ["model.safetensors", "config.json"]),
        (".", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("model.safetensors.index.json", ["model.safetensors.index.json"]),
    ],
)
def test_weights_without_a_training_state_name_the_flag_that_takes_them(
    tmp_path: Path, path: str, files: list[str]
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"weights")
    requested = str(tmp_path / path)
    with pytest.raises(CheckpointError) as refusal:
        choose_checkpoint(requested, tmp_path / "out")
    assert f"--checkpoint-path {requested} holds weights only (safetensors)" in str(refusal.value)
    assert str(refusal.value).endswith(f"--init-from {requested}")


def test_safetensors_beside_checkpoints_do_not_matter(output_dir: Path) -> None:
    (output_dir / "model.safetensors").touch()
    (output_dir / "pretrained" / "model.safetensors").touch()
    for requested in (output_dir, output_dir / "pretrained"):
        choice = choose_checkpoint(str(requested), output_dir)
        assert choice.reader is not None and choice.reader.step == 11
