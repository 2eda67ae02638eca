"""Names in a run's output folder, and JSON files that are whole at every instant."""

import json
import math
from pathlib import Path

import pytest

from argonne.errors import first_line, one_line
from argonne.files import OutputFolder, checkpoint_name, checkpoint_step, json_safe, read_json, write_json


def test_the_names_in_an_output_folder(tmp_path: Path) -> None:
    """As users, schedulers and the documentation spell them."""
    output = OutputFolder(tmp_path)
    paths = {
        "pretrained/tensor_parallel_checkpoint_step_12.pth": output.checkpoint(12),
        "stats/training_metrics.jsonl": output.metrics,
        "stats/run_status.json": output.status,
        "stats/run.lock": output.lock,
        "stats/current_training_stats_tensor_parallel_step_12.json": output.current_stats(12),
        "stats/final_training_stats_tensor_parallel_20260101_000000.json": output.final_stats(
            "20260101_000000"
        ),
        "stats/stack_rank_3.txt": output.stack(3),
        "stats/flight_recorder_rank_": output.flight_recorder_prefix,
        "pretrained": output.pretrained,
        "stats": output.stats,
        "cache": output.cache,
    }
    assert {name: tmp_path / name for name in paths} == paths
    assert list(tmp_path.iterdir()) == []


def test_the_step_in_a_checkpoints_name() -> None:
    assert checkpoint_step(checkpoint_name(300)) == 300
    for other in ("streaming_checkpoint_step_300.pth", "tensor_parallel_checkpoint_step_300_rank_0_of_2.pth"):
        assert checkpoint_step(other) is None
    assert checkpoint_step(f".{checkpoint_name(300)}.host.1.saving") is None


def test_the_newest_statistics_are_those_of_the_largest_step(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path)
    assert output.newest_current_stats() is None
    output.stats.mkdir()
    for name in (*(output.current_stats(step).name for step in (900, 1000)), "current_training_stats_x.json"):
        (output.stats / name).write_text("{}")
    (output.stats / "current_training_stats_tensor_parallel_step_copy.json").write_text("{}")
    assert output.newest_current_stats() == output.current_stats(1000)


def test_json_without_nan_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    assert read_json(path) is None
    write_json(path, {"loss": math.nan, "path": tmp_path, "steps": (1, 2), "ok": True})
    assert read_json(path) == {"loss": None, "path": str(tmp_path), "steps": [1, 2], "ok": True}
    assert json_safe([-math.inf, 1.5]) == [None, 1.5]
    for damaged in ("[1]", "{", ""):
        path.write_text(damaged)
        assert read_json(path) is None


def test_a_failed_write_leaves_the_old_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "document.json"
    write_json(path, {"step": 1})

    def refuse(*_: object) -> None:
        raise OSError("no rename today")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no rename"):
        write_json(path, {"step": 2})
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    assert json.loads(path.read_text()) == {"step": 1}


def test_a_librarys_message_on_one_line() -> None:
    error = RuntimeError("connect failed:\n  no route\n\nC++ frames")
    assert one_line(error) == "connect failed: no route C++ frames"
    assert first_line(error) == "connect failed:"
    assert one_line(KeyError()) == first_line(KeyError()) == "KeyError"
