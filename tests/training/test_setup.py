"""What happens once around the loop: the claim on the folder, tokenizer, data, room, verification, export."""

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config.options import DataOptions, ParallelOptions, TrainingOptions
from argonne.errors import CheckpointError, DataError, RunError
from argonne.ranks.launch import Environment
from argonne.ranks.world import World
from argonne.run.control import RunControl
from argonne.run.signals import STOP_SIGNALS
from argonne.testing.corpus import small_corpus
from argonne.training.setup import (
    check_room_on_rank_0,
    choose_start,
    claim_output,
    open_feed,
    source_options,
    tokenizer_on_rank_0,
    verify_if_asked,
)
from tests.run.pretended import elastic
from tests.training.small_run import control_and_report, run_config, single_stage, trained_model

ALONE = World(
    rank=0, world_size=1, local_rank=0, local_world_size=1,
    device=torch.device("cpu"), control_group=None, feed_group=None,
)  # fmt: skip


@pytest.fixture
def stopping_signals() -> Iterator[None]:
    """A run that ends inside this process leaves it deaf to signals, which later children would inherit."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def control_of(folder: Path, environ: dict[str, str]) -> RunControl:
    launch = Environment.read(environ=environ).launch
    return RunControl(folder, rank=0, world_size=1, launch=launch, warn=print)


def end_attempt(folder: Path, state: str, reason: str, **fields: Any) -> None:
    """What an earlier attempt of torchrun's run "one" left."""
    path = folder / "stats" / "run_status.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    launcher = Environment.read(environ=elastic()).launch.launcher
    document = {"state": state, "reason": reason, "final": True, "run_id": "one", "launcher": launcher}
    path.write_text(json.dumps({**document, **fields}))


def test_the_first_attempt_claims_and_cleans_the_folder(tmp_path: Path, stopping_signals: None) -> None:
    (tmp_path / "pretrained").mkdir()
    stale = tmp_path / "pretrained" / ".tensor_parallel_checkpoint_step_4.pth.1.saving"
    stale.touch()
    control = control_of(tmp_path, {})
    assert claim_output(control, ALONE) is None
    assert json.loads((tmp_path / "stats" / "run_status.json").read_text())["state"] == "running"
    assert not stale.exists()
    second = control_of(tmp_path, {})
    assert second.launch.run_id == control.launch.run_id
    control.finish("finished")


def test_a_restart_learns_how_the_earlier_attempt_ended(tmp_path: Path) -> None:
    restart = elastic(restart=1, most=3)
    end_attempt(tmp_path, "stopped", "SIGTERM")
    assert claim_output(control_of(tmp_path, restart), ALONE) == ("stopped", "SIGTERM")
    end_attempt(tmp_path, "failed", "shard.parquet is unreadable: remove it")
    with pytest.raises(RunError, match=r"a restart would end the same way, .* shard.parquet is unreadable"):
        claim_output(control_of(tmp_path, restart), ALONE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=20, length=300)
    return DataOptions(tokenizer_path=str(tokenizer), data_glob=(glob,))


def test_a_start_from_scratch(tmp_path: Path, data: DataOptions) -> None:
    control, report = control_and_report(tmp_path)
    config = run_config(tmp_path, data=data)
    tokenizer, size = tokenizer_on_rank_0(config, ALONE)
    assert size == 1 + max(tokenizer.get_vocab().values())
    start = choose_start(config, control, report, ALONE)
    assert start.view is None and "scratch" in start.reason and start.settings["vocab_size"] == size
    opened, feed = open_feed(
        config, start.tokenizer, start.metadata, start.step, 2, report, ALONE, new_stage=False
    )
    try:
        assert opened is not None and opened.shards
        batch = feed.next()
        assert batch.tokens.shape == (2, config.training.block_size + 1)
        text = tokenizer.decode(batch.tokens[0].tolist())
        assert text and len(set(batch.tokens[0].tolist())) > 2
    finally:
        feed.close()


def test_a_glob_without_shards_ends_the_run(tmp_path: Path, data: DataOptions) -> None:
    control, report = control_and_report(tmp_path)
    config = run_config(tmp_path, data=dataclasses.replace(data, data_glob=(str(tmp_path / "no*.parquet"),)))
    start = choose_start(config, control, report, ALONE)
    with pytest.raises(DataError, match="--data-glob"):
        open_feed(config, start.tokenizer, start.metadata, start.step, 2, report, ALONE, new_stage=True)


def test_the_cache_lies_in_the_output_folder_unless_it_is_given(tmp_path: Path) -> None:
    assert source_options(run_config(tmp_path), 2).cache_dir == tmp_path / "cache"
    given = run_config(tmp_path, data=DataOptions(tokenizer_path="t", data_cache_dir=str(tmp_path / "c")))
    assert source_options(given, 2).cache_dir == tmp_path / "c"


def test_a_disk_without_room_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_and_report(tmp_path)
    trained, config = trained_model(), run_config(tmp_path)
    check_room_on_rank_0(config, trained, single_stage(config), 0, ALONE)
    usage = type("Usage", (), {"free": 1000, "total": 1000, "used": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="bytes free"):
        check_room_on_rank_0(config, trained, single_stage(config), 0, ALONE)


def test_the_split_is_verified_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control, report = control_and_report(tmp_path)
    trained = trained_model()
    verify_if_asked(run_config(tmp_path), trained, control, report)
    assert capsys.readouterr().out == ""
    asked = run_config(
        tmp_path,
        parallel=ParallelOptions(verify_sharding=True),
        training=TrainingOptions(batch_size=2, block_size=16, dtype="fp32"),
    )
    verify_if_asked(asked, trained, control, report)
    assert "Verified the split: " in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in trained.model.parameters())
