"""Whole runs with a spike in them, which is skipped or rewound, and with a profile and samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.files import OutputFolder
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import SCHEDULE, SHAPE, checkpoint, launch, metrics

KEPT = ("step", "loss", "lr", "grad_norm", "tokens_processed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=90, length=600)
    flags = ["--tokenizer-path", str(tokenizer), "--data-glob", glob, "--total-steps", "14"]
    return [*flags, *SHAPE, *SCHEDULE, "--checkpoint-interval", "6", "--log-interval", "1"]


def spikes(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in OutputFolder(output).spikes.read_text().splitlines()]


def place(position: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(position[key] for key in ("epoch", "file_name", "row", "token_offset"))


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(checkpoint(output, step), weights_only=True)[
        "model_state_dict"
    ]
    return found


def fault(*batches: int) -> dict[str, Any]:
    return {"kind": "spike", "batches": batches, "factor": 1e4, "least": 5}


def test_a_spike_is_skipped_on_all_ranks(tmp_path: Path, data: list[str]) -> None:
    """The gradient of one rank only spikes; the norm is everyone's."""
    flags = [*data, "--replica-check-interval", "1", "--output-dir", tmp_path]
    finished = launch(2, *flags, "--spike-action", "skip", fault=fault(9))
    assert finished.code == 0, finished.stderr
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert [line["step"] for line in lines if line.get("skipped") == "spike"] == [9]
    spike = lines[8]["spike"]
    assert spike["quantity"] == "grad_norm" and spike["value"] == lines[8]["grad_norm"] > spike["threshold"]
    (record,) = spikes(tmp_path)
    assert (record["step"], record["action"]) == (9, "skip") and record.items() >= spike.items()
    assert place(record["data_before"]) == place(lines[7]["data_position"])
    assert place(record["data_after"]) == place(lines[8]["data_position"])
    assert "Spike at step 9: grad_norm " in finished.stdout and "the step was skipped" in finished.stdout


@pytest.mark.slow
def test_a_spike_is_rewound_and_its_window_passed_over(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path]
    finished = launch(1, *flags, "--spike-action", "rewind", fault=fault(9))
    assert finished.code == 0, finished.stderr
    assert "back to" in finished.stdout and "passing over the data of steps 7 to 9" in finished.stdout
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert not any(line.get("skipped") for line in lines)
    (record,) = spikes(tmp_path)
    assert (record["step"], record["action"], record["back_to_step"]) == (9, "rewind", 6)
    assert place(record["data_from"]) == place(lines[5]["data_position"])
    noted = [line for line in lines if "spike" in line]
    assert [(line["step"], line["spike"]["step"], line["spike"]["back_to_step"]) for line in noted] == [
        (7, 9, 6)
    ]
    assert [line["tokens_processed"] for line in lines] == [128 * step for step in range(1, 15)]

    # Had the checkpoint after step 6 stood behind the window, training would have gone on alike.
    other = tmp_path / "other"
    saved = torch.load(checkpoint(tmp_path, 6), weights_only=True)
    del saved["checkpoint_format"]  # the digest is of the file as it was
    saved["data_position"] = record["data_after"]
    (other / "pretrained").mkdir(parents=True)
    torch.save(saved, checkpoint(other, 6))
    again = launch(1, *data, "--output-dir", other)
    assert again.code == 0, again.stderr
    for mine, theirs in zip(lines[6:], metrics(other), strict=True):
        assert [mine[key] for key in KEPT] == [theirs[key] for key in KEPT]
    ends = weights(tmp_path, 14), weights(other, 14)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.slow
def test_a_resume_judges_alike(tmp_path: Path, data: list[str]) -> None:
    """Stopped behind the checkpoint, a run that had gone back does so again; its records are the same."""
    whole = launch(
        1, *data, "--spike-action", "rewind", "--output-dir", tmp_path / "whole", fault=fault(9, 10)
    )
    assert whole.code == 0, whole.stderr
    assert [record["step"] for record in spikes(tmp_path / "whole")] == [9, 7]
    part = tmp_path / "part"
    flags = [*data, "--spike-action", "rewind", "--output-dir", part]
    assert launch(1, *flags, "--total-steps", "14", fault=fault(9, 10)).code == 0
    for step in (12, 14):
        checkpoint(part, step).unlink()
    again = launch(1, *flags, fault=fault(3, 4))
    assert again.code == 0, again.stderr
    for mine, theirs in zip(metrics(part), metrics(tmp_path / "whole"), strict=True):
        assert [mine[key] for key in KEPT] == [theirs[key] for key in KEPT]
    assert spikes(part) == spikes(tmp_path / "whole")


@pytest.mark.slow
def test_without_an_action_a_spike_is_trained_on(tmp_path: Path, data: list[str]) -> None:
    finished = launch(1, *data, "--output-dir", tmp_path, fault=fault(9))
    assert finished.code == 0, finished.stderr
    assert not OutputFolder(tmp_path).spikes.exists()
    assert not any("spike" in line for line in metrics(tmp_path))
    assert "spike_rule" not in torch.load(checkpoint(tmp_path, 14), weights_only=True)


@pytest.mark.slow
def test_a_profile_and_samples_change_no_bit(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--total-steps", "8", "--output-dir"]
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    more = ["--profile", "3:2", "--sample-interval", "4", "--sample-prompt", "def main():"]
    finished = launch(1, *flags, watched, *more)
    assert finished.code == 0 and launch(1, *flags, plain).code == 0, finished.stderr
    assert "Profile of steps 3 to 4 (rank 0): compute " in finished.stdout
    assert "\x1b" not in finished.stdout + finished.stderr and "\r" not in finished.stdout + finished.stderr
    trace = json.loads((OutputFolder(watched).profile / "trace_rank_0.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    samples = [json.loads(line) for line in OutputFolder(watched).samples.read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in samples] == [(4, "def main():"), (8, "def main():")]
    assert all(line["text"].startswith("def main():") for line in samples)
    for mine, theirs in zip(metrics(watched), metrics(plain), strict=True):
        assert [mine[key] for key in KEPT] == [theirs[key] for key in KEPT]
    ends = weights(watched, 8), weights(plain, 8)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert not OutputFolder(plain).samples.exists() and not OutputFolder(plain).profile.exists()
