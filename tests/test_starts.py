"""What a run starts from, through the command line: another trainer's checkpoint, a folder of weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from argonne.testing.corpus import small_corpus
from argonne.testing.launch import checkpoint, launch, metrics
from tests import FIXTURES
from tests.checkpoint.weights_folders import foreign_model, save_folder

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


@pytest.mark.slow
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


RELEASED = FIXTURES / "family_checkpoint_step_20_hf"


def test_a_run_begins_with_a_folders_weights_and_is_submitted_again(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, *STEPS, "--init-from", RELEASED, "--output-dir", tmp_path, "--min-learning-rate", 0]
    first = launch(2, *flags, "--sequence-parallel", "--total-steps", 2, "--checkpoint-interval", 1)
    assert first.code == 0, first.stderr
    assert "starting at step 0 from the weights of" in first.stdout and "Adam" not in first.stderr
    assert "max_position_embeddings raised from 48 to --block-size 64" in first.stdout
    assert [(line["step"], line["lr"]) for line in metrics(tmp_path)] == [(1, 0.0), (2, 5e-5)]
    content = torch.load(checkpoint(tmp_path, 1), weights_only=True)
    assert content["tokens_processed"] == 128 and content["optimizer_state_dict"]["state"][0]["step"] == 1
    for name, weight in load_file(RELEASED / "model.safetensors").items():  # step 0 had a rate of 0
        assert torch.equal(content["model_state_dict"][name], weight.float()), name
    again = launch(1, *flags, "--total-steps", 3)
    assert again.code == 0, again.stderr
    assert f"(step 2); --init-from {RELEASED} was used before" in again.stdout
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    exported = content["model_config"]
    assert exported["max_position_embeddings"] == 64 and exported["logit_softcap"] == 15.0


@pytest.mark.slow
def test_a_qwen2_folder_and_a_checkpoint_as_beginnings(tmp_path: Path, data: list[str]) -> None:
    folder = save_folder(
        foreign_model("qwen2", vocab_size=512, max_position_embeddings=64), tmp_path / "qwen2"
    )
    flags = [*data, *STEPS, "--total-steps", 2]
    finished = launch(1, *flags, "--init-from", folder, "--output-dir", tmp_path / "one")
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count("qwen2 has no bias in its output projections: 2 begin at zero") == 1
    start = checkpoint(tmp_path / "one", 2)
    finished = launch(1, *flags, "--init-from", start, "--output-dir", tmp_path / "two")
    assert finished.code == 0 and f"the weights of {start} (its step 2)" in finished.stdout
    assert torch.load(checkpoint(tmp_path / "two", 2), weights_only=True)["tokens_processed"] == 256


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--checkpoint-path", "NONE"], "--checkpoint-path"),
        (["--force-from-scratch"], "--force-from-scratch"),
    ],
)
def test_two_beginnings_contradict_each_other(
    tmp_path: Path, data: list[str], more: list[str], named: str
) -> None:
    finished = launch(1, *data, "--init-from", RELEASED, *more, "--output-dir", tmp_path)
    assert finished.code == 2 and len(finished.errors()) == 1 and named in finished.errors()[0]


@pytest.mark.slow
def test_a_folder_of_another_architecture_and_a_wrong_path(tmp_path: Path, data: list[str]) -> None:
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text('{"model_type": "gemma2"}')
    finished = launch(1, *data, "--init-from", tmp_path / "gemma", "--output-dir", tmp_path)
    assert finished.code == 2 and "gemma2" in finished.stderr and len(finished.stderr.splitlines()) == 1
    finished = launch(2, *data, "--init-from", tmp_path / "nowhere", "--output-dir", tmp_path)
    assert len(finished.errors()) == 1 and "--init-from" in finished.errors()[0]
    other = launch(
        1, *data, "--init-from", RELEASED, "--model-config", "argonne-tiny-4", "--output-dir", tmp_path
    )
    assert other.code == 1 and "hidden_size is 96 in the checkpoint and 128 in --model-config" in other.stderr
