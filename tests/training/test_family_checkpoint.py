"""A checkpoint of the family's own trainer goes on through the real training step, at every degree."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config.options import ModelOptions, ParallelOptions
from argonne.config.presets import PRESETS, settings_of_document
from argonne.errors import CheckpointError
from argonne.testing.distributed import make_parallel, run_ranks
from argonne.training.build import build_model, fill_weights, model_settings
from argonne.training.model_config import local_attention_line, resolve_model_config
from argonne.training.schedule import Schedule
from argonne.training.step import TrainingStep, Votes
from checkpointing import CheckpointView, open_chosen
from data_stream import StepBatch
from tests import FIXTURES
from tests.training.small_run import training_options

CHECKPOINT = FIXTURES / "family_checkpoint_step_20.pt"


def told() -> dict[str, Any]:
    """What the next steps must give."""
    document: dict[str, Any] = json.loads(CHECKPOINT.with_suffix(".json").read_text())
    return document


def options_of(folder: Path, document: dict[str, Any]) -> ModelOptions:
    """--model-config with this document."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return ModelOptions(model_config=str(path), settings=settings_of_document(document, "test"))


def opened(rank: int = 0, path: Path = CHECKPOINT) -> CheckpointView:
    view, _, _ = open_chosen(str(path), Path(), force_from_scratch=False, rank=rank, control_group=None)
    assert view is not None
    return view


def continued(rank: int, world_size: int, sequence_parallel: bool, folder: str) -> list[tuple[float, ...]]:
    """(loss, gradient norm, learning rate) of the steps that follow."""
    expected = told()
    parameters = expected["hyperparameters"]
    view = opened(rank)
    settings = model_settings(options_of(Path(folder, str(rank)), expected["config"]), view, 515)
    parallel = make_parallel(rank, world_size, world_size)
    base = training_options(
        batch_size=4,
        block_size=48,
        grad_clip=parameters["clip"],
        adam_betas=tuple(parameters["betas"]),
        weight_decay=parameters["wd"],
        warmup_steps=0,
    )
    trained = build_model(settings, ParallelOptions(sequence_parallel=sequence_parallel), base, parallel)
    report = fill_weights(trained, view, seed=0)
    assert report is not None and report.optimizer_restored and not report.warnings
    schedule = Schedule(
        kind="wsd",
        peak=parameters["lr"],
        minimum=parameters["min_lr"],
        warmup_steps=parameters["warmup"],
        total_steps=parameters["total"],
        cooldown_steps=parameters["cool"],
    )
    results: list[tuple[float, ...]] = []
    for step, tokens in enumerate(expected["token_batches"], start=view.step):
        rate = schedule.rate(step)
        one_step = TrainingStep(trained, replace(base, learning_rate=rate, min_learning_rate=rate), 1)
        ids = torch.tensor(tokens, dtype=torch.int32)
        batch = StepBatch(tokens=ids, stream_hash="", progress=None, wait_seconds=0.0)
        result = one_step.run(batch, step, votes=Votes())
        results.append((result.totals.loss, result.totals.grad_norm, result.lr))
    return results


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_the_steps_that_follow(tmp_path: Path, world_size: int, sequence_parallel: bool) -> None:
    folders = str(tmp_path)
    ranks = run_ranks(continued, world_size, sequence_parallel, folders)
    expected = told()
    figures = zip(expected["losses"], expected["grad_norms"], expected["learning_rates"], strict=True)
    for (loss, norm, rate), wanted in zip(ranks[0], figures, strict=True):
        assert abs(loss - wanted[0]) <= 3e-5
        assert abs(norm / wanted[1] - 1) <= 3e-4
        assert abs(rate - wanted[2]) <= 1e-9
    assert all(other == ranks[0] for other in ranks)


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    view = opened()
    assert (view.kind, view.step, view.metadata["tokens_processed"]) == ("family", 20, 3840)
    assert view.saved_position is None and view.metadata["data_position"] == 0
    settings = model_settings(options_of(tmp_path, told()["config"]), view, 512)
    wanted = {key: value for key, value in told()["config"].items() if value is not None}
    assert {key: settings[key] for key in wanted if key in settings} == {
        key: value for key, value in wanted.items() if key in PRESETS["argonne-4.0"]
    }
    assert settings["head_dim"] == 16


def test_norms_on_heads_need_a_model_config() -> None:
    view = opened()
    with pytest.raises(CheckpointError, match=r"norms on its heads .* give --model-config") as caught:
        model_settings(ModelOptions(), view, 512)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="give --model-config"):
        assert view.reader is not None
        resolve_model_config(view.reader, None)


def test_a_model_config_without_the_files_norms_is_refused(tmp_path: Path) -> None:
    config = {**told()["config"], "v_norm": False}
    with pytest.raises(CheckpointError, match="v_norm is True in the checkpoint and False in --model-config"):
        model_settings(options_of(tmp_path, config), opened(), 512)
    preset = ModelOptions(model_config="argonne-2.0", settings=PRESETS["argonne-2.0"])
    with pytest.raises(CheckpointError, match=r"24 query and 8 key/value heads .* head_dim of 16"):
        model_settings(preset, opened(), 512)
    heads = {**told()["config"], "num_attention_heads": 12}
    with pytest.raises(CheckpointError, match=r"12 query and 2 key/value heads .* head_dim of 16"):
        model_settings(options_of(tmp_path, heads), opened(), 512)


def saved(folder: Path, **changes: Any) -> CheckpointView:
    """The fixture with some keys changed (None: left out)."""
    content = {**torch.load(CHECKPOINT, weights_only=True), **changes}
    path = folder / "checkpoint_step_20.pt"
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return opened(path=path)


@pytest.mark.parametrize("position", [7, {"shard": 3, "offset": 100}, {}])
def test_whatever_the_position_it_is_another_readers(tmp_path: Path, position: Any) -> None:
    view = saved(tmp_path, data_position=position)
    assert view.kind == "family" and view.saved_position is None


def test_a_dictionary_of_another_reader_is_enough(tmp_path: Path) -> None:
    view = saved(tmp_path, data_position={"shard": 3}, scheduler_state_dict=None)
    assert view.kind == "family" and view.saved_position is None
    pipeline = saved(
        tmp_path, data_position={"current_file_idx": 1, "streaming": True}, scheduler_state_dict={"step": 19}
    )
    assert pipeline.kind == "pipeline" and pipeline.saved_position is not None


def test_a_stored_configuration_is_compared_with_the_weights(tmp_path: Path) -> None:
    view = saved(tmp_path, model_config={**told()["config"], "sandwich_norm": False})
    with pytest.raises(
        CheckpointError, match="sandwich_norm False in its model_config and True by its weights"
    ):
        model_settings(ModelOptions(), view, 512)
    view = saved(tmp_path, model_config={**told()["config"], "logit_softcap": 20.0})
    with pytest.raises(CheckpointError, match=r"logit_softcap is 20.0 in the checkpoint and 15.0 in"):
        model_settings(options_of(tmp_path, told()["config"]), view, 512)


def test_a_window_is_named_and_can_be_turned_off(tmp_path: Path) -> None:
    config = {**told()["config"], "interleaved_local_attention": True, "local_attention_window": 24}
    options = options_of(tmp_path, config)
    settings = model_settings(options, opened(), 512)
    assert settings["local_attention_window"] == 24
    line = local_attention_line(settings)
    assert line is not None and "layers 1, 3 of 4: 24 tokens" in line and "--local-attention off" in line
    settings = model_settings(replace(options, local_attention="off"), opened(), 512)
    assert settings["interleaved_local_attention"] is False and "local_attention_window" not in settings
    assert local_attention_line(settings) is None
    stored = {key: value for key, value in told()["config"].items() if value is not None}
    again = saved(tmp_path, model_config=stored)  # what the run then saved, resumed by the same command
    resumed = model_settings(replace(options, local_attention="off"), again, 512)
    assert resumed["interleaved_local_attention"] is False and resumed["logit_softcap"] == 15.0
    with pytest.raises(
        CheckpointError, match="interleaved_local_attention is False in the checkpoint and True"
    ):
        model_settings(options, again, 512)
