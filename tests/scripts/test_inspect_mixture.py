"""scripts/inspect_data.py on a mixture: what a run will read, and any step by source."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_data import main as inspect

import argonne.testing.corpus as corpus
from argonne.data.tokenizer import load_tokenizer
from data_stream import open_stream
from model import ArgonneConfig, ArgonneModel
from tests.data.mixture_samples import WEIGHTS, options_of, write_sources
from tests.data.naive import ids_of, mixture_order, natural_rows

STEPS, G, BLOCK = 40, 3, 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    write_sources(folder)
    corpus.build_tokenizer(folder / "tokenizer")
    return folder


def flags(place: Path, *more: str) -> list[str]:
    mix = [f"{name}={weight}:{place / name}/*.parquet" for name, weight in WEIGHTS.items()]
    shape = ["--block-size", str(BLOCK), "--global-batch-size", str(G), "--num-proc", "1"]
    return ["--data-mix", *mix, "--tokenizer-path", str(place / "tokenizer"), *shape, *more]


def test_what_a_run_will_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples by the rule; epochs within what an estimate from sampled rows allows."""
    assert inspect(flags(place, "--total-steps", str(STEPS))) == 0
    shown = capsys.readouterr().out
    assert f"{STEPS} steps read {STEPS * G} samples, {STEPS * G * BLOCK:,} tokens" in shown
    table = {line.split()[0]: line.split() for line in shown.splitlines() if "%" in line}
    order = mixture_order(list(WEIGHTS.values()), STEPS * G)
    tokenizer = load_tokenizer(str(place / "tokenizer"))
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        _, share, samples, tokens, epochs = table[name]
        assert share == f"{float(weight):.2%}"
        assert abs(int(samples) - order.count(number)) <= 1
        assert int(tokens.replace(",", "")) == int(samples) * BLOCK
        whole = sum(len(ids_of(text, tokenizer)) for _, _, text in natural_rows(place / name) if text)
        assert float(epochs) == pytest.approx(order.count(number) * BLOCK / whole, rel=0.6)
    assert inspect(flags(place)) == 0
    assert "give --total-steps" in capsys.readouterr().out


def test_a_step_by_source(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its number, from the metrics, from a checkpoint: the samples of the run, each under its source."""
    folders = {name: place / name for name in WEIGHTS}
    tokenizer = load_tokenizer(str(place / "tokenizer"))
    options = options_of(folders, block_size=BLOCK, samples_per_step=G, shuffle=True, holdout=9, seed=4)
    opened = open_stream(options, tokenizer)
    steps = [opened.source.next_step() for _ in range(8)]
    opened.source.close()
    records = [{"step": index + 1} | step.progress.metrics() for index, step in enumerate(steps)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shape: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    weights = ArgonneModel(ArgonneConfig(vocab_size=16, intermediate_size=8, **shape)).state_dict()
    progress = steps[3].progress
    saved = {"data_position": opened.position_dict(progress), "data_state": opened.state_dict(progress)}
    torch.save({**saved, "global_step": 4, "model_state_dict": weights}, tmp_path / "ck.pth")
    run = ["--shuffle", "--holdout", "9", "--seed", "4", "--step", "7"]
    found = []
    for way in (
        [],
        ["--metrics", str(tmp_path / "metrics.jsonl")],
        ["--checkpoint-path", str(tmp_path / "ck.pth")],
    ):
        assert inspect(flags(place, *run, *way)) == 0
        found.append(capsys.readouterr().out)
    expected = [tokenizer.decode(sample[:-1]).rstrip("\n") for sample in steps[7].tokens]
    assert steps[7].sources is not None
    origins = [list(WEIGHTS)[number] for number in steps[7].sources]
    for shown in found:
        parts = shown.split("\n--- sample ")[1:]
        assert [part.split("---\n", 1)[1].rstrip("\n") for part in parts] == expected
        assert [part.split(" of ", 1)[1].split(" ---")[0] for part in parts] == origins
        for name, end in steps[7].progress.positions.items():
            assert f"source {name}: to   {end.file_name}, row {end.row}, token {end.token_offset}" in shown
    assert steps[7].progress.stream_hash in found[0] and steps[7].progress.stream_hash in found[2]


def test_mistakes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in [
        (["--data-mix", "web=1:again"], "names web twice"),
        (["--data-mix", "nothing"], "NAME=WEIGHT:GLOB"),
        (["--at", "000_00000.parquet:1"], "--at"),
        (["--shuffle", "--no-streaming"], "--shuffle contradicts"),
        (["--holdout", "1"], "--holdout 1 must be at least 2"),
    ]:
        assert inspect(flags(place, *more)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
