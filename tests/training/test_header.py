"""What a run says at its start: facts, warnings, and the metrics it opens."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.config.mixture import mixed_source
from argonne.config.options import DataOptions, ParallelOptions
from argonne.config.run_options import CheckpointOptions
from argonne.data.excluded import Exclusion
from argonne.run.processes import Launch
from argonne.run.report import RunReport
from argonne.training.header import (
    data_line,
    estimated_save,
    open_metrics,
    run_facts,
    source_lines,
    switches,
    warn_ahead,
)
from argonne.training.saving import SavingMode
from checkpointing import checkpoint_path
from data_stream import DataPosition
from tests.training.small_run import control_and_report, run_config, trained_model


def opened_at(**position: Any) -> Any:
    place = DataPosition(**{"epoch": 1, "file_name": "a.parquet", "row": 7, "token_offset": 30, **position})
    start = SimpleNamespace(position=place, positions={"web": place, "code": place})
    return SimpleNamespace(
        shards=["a", "b"],
        start=start,
        source_names=(),
        corpora={"web": "abc", "code": "d"},
        exclusion=Exclusion(),
    )


def test_where_the_data_begins() -> None:
    assert data_line("*.parquet", None) == "0 shards of *.parquet"
    assert (
        data_line("*.parquet", opened_at()) == "2 shards of *.parquet, from a.parquet row 7 token 30, epoch 1"
    )
    assert data_line("x", opened_at(sample=12)) == "2 shards of x, from sample 12 of epoch 1"


def test_each_source_of_a_mixture_has_a_line() -> None:
    mix = tuple(mixed_source(text) for text in ("web=0.7:w/*", "code=.3:c/*"))
    opened = opened_at()
    opened.source_names = ("web", "code")
    assert data_line("unused", opened) == "mixture of 2 sources, 2 shards"
    lines = source_lines(DataOptions(data_mix=mix, shuffle=True, holdout=50), opened)
    assert lines["Source web"] == "weight 0.7, 3 shards of w/*, from a.parquet row 7 token 30, epoch 1"
    assert lines["Source code"].startswith("weight .3, 1 shards of c/*")
    assert lines["Held out"] == "one document in 50" and "Shuffled" in lines
    assert source_lines(DataOptions(), opened) == {}


def test_only_what_is_on_is_said() -> None:
    assert switches(ParallelOptions()) == {}
    everything = ParallelOptions(sequence_parallel=True, activation_checkpointing="full", compile=True)
    assert switches(everything) == {
        "Sequence parallel": "on",
        "Recomputation": "full",
        "Compiled": "each block",
    }


def test_facts(tmp_path: Path) -> None:
    trained, config = trained_model(), run_config(tmp_path)
    _, report = control_and_report(tmp_path)
    save = estimated_save(report, config, trained)
    assert save is not None and save.size > 3 * 4 * trained.slice_map.numel()  # weights and two moments
    facts = run_facts(config, trained, opened_at(), samples_per_step=6, start="from scratch", save=save)
    assert facts.parameters == sum(weight.numel() for weight in trained.model.parameters())
    assert (facts.batch_size, facts.accumulation, facts.tp_size, facts.dp_size) == (2, 3, 1, 1)
    assert (facts.precision, facts.save_bytes, facts.checkpoint) == ("float32", save.size, "from scratch")
    assert facts.extra["Schedule"] == "cosine, 0.01 to 0.001 over 10 steps, 2 of warm-up"
    assert facts.device.startswith("CPU (") and facts.output_dir == str(tmp_path.resolve())
    assert "Checkpoints" not in facts.extra
    place: dict[str, Any] = {
        "samples_per_step": 6,
        "start": "",
        "save": dataclasses.replace(save, share=0.25),
    }
    for background, share in ((False, 0.25), (True, None)):  # of the run's time nothing goes into the latter
        mode = SavingMode(background=background, text="how and why")
        told = run_facts(config, trained, opened_at(), saving=mode, **place)
        assert (told.extra["Checkpoints"], told.save_share) == ("how and why", share)
    silent = RunReport(tmp_path, rank=1)
    assert estimated_save(silent, config, trained) is None


def test_metrics_beyond_the_first_step_are_replaced(tmp_path: Path) -> None:
    _, report = control_and_report(tmp_path)
    path = tmp_path / "stats" / "training_metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    open_metrics(report, run_config(tmp_path), trained_model(), first_step=4, last_step=10)
    report.close()
    assert path.read_text().splitlines() == [f'{{"step": {step}}}' for step in range(1, 5)]


def test_warnings_of_what_lies_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = control_and_report(tmp_path)
    config = run_config(tmp_path)
    launch = Launch(run_id="x", restart_count=0, max_restarts=0, launcher_pid=1, grace_seconds=30.0)
    save: Any = SimpleNamespace(seconds=100.0)
    checkpoint_path(tmp_path / "pretrained", 9).touch()
    warn_ahead(report, config, launch, save, 0)
    assert "torchrun kills its workers 30 s after a signal" in capsys.readouterr().err
    afresh = dataclasses.replace(config, checkpoint=CheckpointOptions(force_from_scratch=True))
    warn_ahead(report, afresh, launch, None, 0)
    assert "holds checkpoints up to step 9, and this run starts at step 0" in capsys.readouterr().err
    warn_ahead(report, afresh, launch, None, 9)
    assert capsys.readouterr().err == ""
