"""What a run starts from, through the command line: another trainer's checkpoint, a folder of weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import checkpoint, launch, metrics
from tests import FIXTURES

FAMILY = FIXTURES / "family_checkpoint_step_20.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=60, length=400)
    return ["--tokenizer-path", str(tokenizer), "--data-glob", glob]


@pytest.fixture(scope="module")
def family_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(json.loads(FAMILY.with_suffix(".json").read_text())["config"]))
    return path


STEPS: list[Any] = ["--batch-size", 2, "--block-size", 64, "--warmup-steps", 2]


def test_the_familys_checkpoint_goes_on_from_a_folder(
    tmp_path: Path, data: list[str], family_config: Path
) -> None:
    folder = tmp_path / "family"
    folder.mkdir()
    shutil.copy(FAMILY, folder / "checkpoint_step_20.pt")
    (folder / "checkpoint_step_21.pt").write_bytes(b"cut")
    flags = [*data, *STEPS, "--total-steps", 22, "--output-dir", tmp_path / "run"]
    finished = launch(1, *flags, "--checkpoint-path", folder, "--model-config", family_config)
    assert finished.code == 0, finished.stderr
    assert "step_21.pt" in finished.stderr and "passed over" in finished.stderr
    assert finished.stderr.count("belongs to another reader's files: the data begins at its start") == 1
    assert "max_position_embeddings raised from 48 to --block-size 64" in finished.stdout
    assert [line["step"] for line in metrics(tmp_path / "run")] == [21, 22]
    assert metrics(tmp_path / "run")[-1]["tokens_processed"] == 3840 + 2 * 2 * 64
    content = torch.load(checkpoint(tmp_path / "run", 22), weights_only=True)
    assert content["model_config"]["max_position_embeddings"] == 64
    assert content["model_config"]["qk_norm"] and content["model_config"]["logit_softcap"] == 15.0
    assert content["optimizer_state_dict"]["state"][0]["step"] == 22
    again = launch(1, *flags, "--total-steps", 23)  # our own checkpoint needs no configuration
    assert again.code == 0 and "reader's files" not in again.stderr, again.stderr


def test_the_familys_checkpoint_without_a_configuration(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, *STEPS, "--total-steps", 22, "--output-dir", tmp_path]
    finished = launch(1, *flags, "--checkpoint-path", FAMILY)
    assert finished.code == 1
    assert len(finished.errors()) == 1 and "give --model-config" in finished.errors()[0]
