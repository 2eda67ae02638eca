"""A faster layout at the same global batch, as the header names it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config.options import ParallelOptions, RunConfig, TrainingOptions
from argonne.config.presets import PRESETS
from argonne.ranks.world import Parallel
from argonne.training import faster_layout as module
from argonne.training.faster_layout import faster_layout, faster_line
from argonne.training.layouts import settled
from argonne.training.plan import Subject, chosen_layout, subject
from model import ArgonneConfig
from tests.training.small_run import run_config

SETTINGS: dict[str, Any] = {**PRESETS["argonne-2.0"], "vocab_size": 151_665}


def eight_gpus(
    tmp_path: Path, memory: float = 80e9, batch_size: int = 4, **parallel: Any
) -> tuple[RunConfig, Subject]:
    config = run_config(
        tmp_path, training=TrainingOptions(global_batch_size=16, batch_size=batch_size),
        parallel=ParallelOptions(**parallel),
    )  # fmt: skip
    return config, subject(config, SETTINGS, world_size=8, device_memory=int(memory))


def test_the_default_is_told_of_a_faster_layout_that_fits(tmp_path: Path) -> None:
    _, what = eight_gpus(tmp_path)
    text = faster_layout(what)
    assert text is not None
    values = {name: int(value) for name, value in re.findall(r"--([a-z-]+) (\d+)", text)}
    degree, accumulation = values["tensor-parallel-size"], values.get("gradient-accumulation-steps", 1)
    assert degree < 8 and values["batch-size"] * accumulation * (8 // degree) == 16  # the same sequences
    factor = float(re.findall(r": ([\d.]+) times", text)[0])
    layout = replace(
        chosen_layout(what), tp_size=degree, dp_size=8 // degree, batch_size=values["batch-size"],
        accumulation=accumulation, sequence_parallel="--sequence-parallel" in text,
    )  # fmt: skip
    faster, chosen = settled(what, layout), settled(what, chosen_layout(what))
    assert faster.fits and factor == pytest.approx(chosen.seconds / faster.seconds, abs=0.006)


def test_nothing_is_said_of_the_fastest(tmp_path: Path) -> None:
    text = faster_layout(eight_gpus(tmp_path)[1]) or ""
    degree, batch_size = (int(value) for value in re.findall(r"-size (\d+)", text))
    sequence = "--sequence-parallel" in text
    _, fastest = eight_gpus(
        tmp_path, batch_size=batch_size, tensor_parallel_size=degree, sequence_parallel=sequence
    )
    assert faster_layout(fastest) is None


def test_what_does_not_fit_is_not_named(tmp_path: Path) -> None:
    roomy, narrow = (faster_layout(eight_gpus(tmp_path, memory)[1]) for memory in (80e9, 17e9))
    assert roomy != narrow


def test_only_where_there_are_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = eight_gpus(tmp_path)
    parallel = Parallel(
        rank=0, world_size=8, local_rank=0, local_world_size=8, device=torch.device("cpu"),
        control_group=None, feed_group=None, tp_rank=0, tp_size=8, dp_rank=0, dp_size=1, mesh=None,
    )  # fmt: skip
    assert faster_line(config, SETTINGS, parallel) == {}
    monkeypatch.setattr(module, "memory_of_a_rank", lambda parallel: 80_000_000_000)
    on_gpu = replace(parallel, device=torch.device("cuda", 0))
    built = ArgonneConfig(**SETTINGS).to_dict()  # what the header has
    assert "Faster layout" in faster_line(config, built, on_gpu)
    assert faster_line(config, built, on_gpu) == faster_line(config, SETTINGS, on_gpu)
