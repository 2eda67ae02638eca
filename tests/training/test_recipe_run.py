"""Runs of a recipe: its stages in one command, as one run whatever stops it."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.data.source import chain_hash
from argonne.files import OutputFolder
from argonne.testing.corpus import short_texts, small_corpus, write_shards
from argonne.testing.launch import checkpoint, launch, metrics, status
from argonne.testing.sources import source_options
from argonne.training.schedule import Schedule
from data_stream import load_tokenizer, open_stream

BLOCK = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    small_corpus(folder, documents=60, length=400)
    write_shards(folder / "other", short_texts(30, 400, skip=90), shards=2)
    return folder


def recipe_text(corpus: Path) -> str:
    return f"""
tokenizer-path = "{corpus}/tokenizer"
data-glob = "{corpus}/data/*.parquet"
model-config = "argonne-tiny"
batch-size = 2
block-size = {BLOCK}
learning-rate = 3e-3
min-learning-rate = 3e-4
warmup-steps = 1
checkpoint-interval = 2
keep-checkpoints = 1
keep-every = 2
eval-samples = 3
eval-interval = 0

[eval-data]
held = "{corpus}/other"

[[stage]]
name = "pretrain"
total-steps = 5
lr-schedule = "wsd"
cooldown-steps = 2

[[stage]]
name = "anneal"
total-tokens = {2 * BLOCK * 4}
data-glob = "{corpus}/other/*.parquet"
lr-schedule = "linear"
grad-clip = 0.4

[[stage]]
name = "long"
block-size = {2 * BLOCK}
total-steps = 3
reset-optimizer = true
"""


@pytest.fixture(scope="module")
def recipe(corpus: Path) -> Path:
    path = corpus / "recipe.toml"
    path.write_text(recipe_text(corpus))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("whole")
    finished = launch(1, "--config", recipe, "--output-dir", output)
    assert finished.code == 0, finished.stderr
    warnings = [line for line in finished.stderr.splitlines() if line.startswith("warning: ")]
    # A slow disk may still be verifying a checkpoint when the next one falls due.
    assert not finished.errors() and all("postponed" in line or "times" in line for line in warnings)
    return output, finished.stdout


def one_of(output: Path, steps: tuple[int, ...]) -> int:
    """The first of these steps that has a checkpoint; ends of stages always have one."""
    for step in steps:
        if checkpoint(output, step).exists():
            return step
    pytest.skip(f"no checkpoint after steps {steps} (postponed on a slow disk)")


def test_stages_run_one_after_another(whole: tuple[Path, str], corpus: Path) -> None:
    output, stdout = whole
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["stage"] for line in lines] == ["pretrain"] * 5 + ["anneal"] * 4 + ["long"] * 3
    assert lines[-1]["tokens_processed"] == 2 * BLOCK * 9 + 4 * BLOCK * 3
    common: dict[str, Any] = {"peak": 3e-3, "minimum": 3e-4, "warmup_steps": 1}
    schedules = (
        Schedule(kind="wsd", total_steps=5, cooldown_steps=2, **common),
        Schedule(kind="linear", total_steps=4, **common),
        Schedule(kind="cosine", total_steps=3, **common),
    )
    rates = [schedule.rate(step) for schedule in schedules for step in range(schedule.total_steps)]
    assert [line["lr"] for line in lines] == rates
    assert "Stage 2 of 3: anneal, steps 6 to 9, " in stdout
    assert status(output)["stage"] == "long" and status(output)["step"] == 12


def test_every_stage_ends_with_a_validation_and_a_lasting_checkpoint(whole: tuple[Path, str]) -> None:
    output, _ = whole
    lines = [json.loads(line) for line in OutputFolder(output).eval_metrics.read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in lines] == [(5, "pretrain"), (9, "anneal"), (12, "long")]
    for step, stage, finished in ((2, "pretrain", 0), (5, "pretrain", 1), (9, "anneal", 2), (12, "long", 3)):
        content = torch.load(checkpoint(output, step), weights_only=True)
        assert content["stage"] == stage and content["global_step"] == step
        assert [record["finished"] for record in content["stages"]].count(True) == finished
        assert content["scheduler_state_dict"] == {"step": step - 1}


def test_a_later_stage_reads_what_the_earlier_did_not(whole: tuple[Path, str], corpus: Path) -> None:
    """Stage long goes on where pretrain stood, at another block size, and anneal began other data."""
    output, _ = whole
    before = torch.load(checkpoint(output, 5), weights_only=True)
    options = source_options(f"{corpus}/data/*.parquet", block_size=2 * BLOCK, samples_per_step=2, num_proc=1)
    tokenizer = load_tokenizer(str(corpus / "tokenizer"))
    opened = open_stream(
        options, tokenizer, saved_position=before["data_position"], saved_state=before["data_state"],
        global_step=5,
    )  # fmt: skip
    tokens = opened.source.next_step().tokens
    opened.source.close()
    lines = metrics(output)
    assert lines[9]["stream_hash"] == chain_hash(lines[4]["stream_hash"], tokens)
    position = lines[5]["data_position"]
    assert (position["file_name"], position["epoch"]) == ("000_00000.parquet", 0)


def test_the_optimizer_goes_on_or_begins_anew(whole: tuple[Path, str]) -> None:
    output, _ = whole
    steps = {
        step: torch.load(checkpoint(output, step), weights_only=True)["optimizer_state_dict"]["state"][0][
            "step"
        ]
        for step in (5, 9, 12)
    }
    assert {step: int(value) for step, value in steps.items()} == {5: 5, 9: 9, 12: 3}


@pytest.mark.parametrize(
    "steps",
    [(4, 3, 2), (5,), *(pytest.param(more, marks=pytest.mark.slow) for more in [(8, 7, 6), (9,), (10, 11)])],
)
def test_started_again_it_goes_on_bit_for_bit(
    tmp_path: Path, whole: tuple[Path, str], recipe: Path, steps: tuple[int, ...]
) -> None:
    output, _ = whole
    step = one_of(output, steps)
    for name in ("pretrained", "stats"):
        (tmp_path / name).mkdir()
    shutil.copy(checkpoint(output, step), tmp_path / "pretrained")
    finished = launch(1, "--config", recipe, "--output-dir", tmp_path)
    assert finished.code == 0, finished.stderr
    kept = ("step", "stage", "loss", "grad_norm", "lr", "tokens_processed", "stream_hash")
    assert [[line[key] for key in kept] for line in metrics(tmp_path)] == [
        [line[key] for key in kept] for line in metrics(output)[step:]
    ]
    again, straight = (torch.load(checkpoint(folder, 12), weights_only=True) for folder in (tmp_path, output))
    for name, tensor in straight["model_state_dict"].items():
        assert torch.equal(again["model_state_dict"][name], tensor), name
    assert again["data_position"] == straight["data_position"] and again["stages"] == straight["stages"]
    ends = {5, 9, 12} - set(range(step))
    assert all(checkpoint(tmp_path, end).exists() for end in ends)


def test_a_finished_recipe_repeats_nothing(tmp_path: Path, whole: tuple[Path, str], recipe: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    finished = launch(1, "--config", recipe, "--output-dir", output)
    assert finished.code == 0 and "This recipe has already finished: " in finished.stdout
    assert metrics(output) == metrics(whole[0])


@pytest.mark.slow
def test_a_finished_stage_that_was_edited_is_refused(
    tmp_path: Path, whole: tuple[Path, str], recipe: Path
) -> None:
    (tmp_path / "pretrained").mkdir()
    shutil.copy(checkpoint(whole[0], 9), tmp_path / "pretrained")
    edited = tmp_path / "edited.toml"
    edited.write_text(recipe.read_text().replace("total-steps = 5", "total-steps = 6"))
    finished = launch(2, "--config", edited, "--output-dir", tmp_path)
    assert len(finished.errors()) == 1
    assert "stage pretrain is finished and was changed" in finished.errors()[0]
    assert "total-steps was 5, is 6" in finished.errors()[0]
    assert not OutputFolder(tmp_path).run_config.exists()


def test_data_of_a_later_stage_is_missed_before_the_first_step(tmp_path: Path, recipe: Path) -> None:
    edited = tmp_path / "edited.toml"
    edited.write_text(recipe.read_text().replace("other/*.parquet", "nothing/*.parquet"))
    finished = launch(1, "--config", edited, "--output-dir", tmp_path)
    assert finished.code == 1 and not OutputFolder(tmp_path).metrics.exists()
    assert finished.errors()[0].startswith("error: stage anneal: no shard matches")


@pytest.mark.slow
def test_the_run_repeats_from_its_resolved_configuration(
    tmp_path: Path, whole: tuple[Path, str], recipe: Path
) -> None:
    kept = OutputFolder(whole[0]).run_config
    document = tomllib.loads(kept.read_text())
    assert [stage["name"] for stage in document["stage"]] == ["pretrain", "anneal", "long"]
    finished = launch(2, "--config", kept, "--output-dir", tmp_path, "--debug")
    assert finished.code == 0, finished.stderr
    assert '\nname = "anneal"\n' in finished.stdout
    for mine, theirs in zip(metrics(tmp_path), metrics(whole[0]), strict=True):
        assert (mine["stage"], mine["stream_hash"]) == (theirs["stage"], theirs["stream_hash"])
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
