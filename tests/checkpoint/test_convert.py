"""Pipeline checkpoints in and out by the scripts, and what the scripts say about a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import convert_checkpoint
import inspect_checkpoint
import pytest
import torch

from argonne.checkpoint.parts import open_any
from argonne.testing.checkpoint_samples import MODEL_CONFIG, save_sample
from model import ArgonneConfig, ArgonneModel
from tests import FIXTURES, ROOT
from tests.checkpoint.pipeline_samples import (
    assert_whole,
    fixture_config,
    pipeline_checkpoint,
    write_stages,
)


@pytest.mark.parametrize("step", [25, 40])
def test_pipeline_to_ours_and_back_bit_for_bit(tmp_path: Path, step: int) -> None:
    source = FIXTURES / f"streaming_checkpoint_step_{step}.pth"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fixture_config(step)))
    to_ours = ["--checkpoint-path", str(source), "--output", str(tmp_path), "--to", "tensor-parallel"]
    assert convert_checkpoint.main([*to_ours, "--model-config", str(config)]) == 0
    ours = tmp_path / f"tensor_parallel_checkpoint_step_{step}.pth"
    original, converted = torch.load(source, weights_only=True), torch.load(ours, weights_only=True)
    model = ArgonneModel(ArgonneConfig(**converted["model_config"]))
    model.load_state_dict(converted["model_state_dict"], strict=True)
    torch.optim.AdamW(model.parameters()).load_state_dict(converted["optimizer_state_dict"])
    for key in ("global_step", "tokens_processed", "loss", "data_position", "scheduler_state_dict"):
        assert converted[key] == original[key]
    back = ["--checkpoint-path", str(ours), "--output", str(tmp_path), "--to", "pipeline", "--dtype", "bf16"]
    assert convert_checkpoint.main(back) == 0
    returned = torch.load(tmp_path / source.name, weights_only=True)
    assert returned["model_dtype"] == "torch.bfloat16" and "model_config" not in returned
    for name, weight in original["model_state_dict"].items():
        assert torch.equal(returned["model_state_dict"][name.removeprefix("_orig_mod.")], weight)
    for index, state in original["optimizer_state_dict"]["state"].items():
        for key, values in state.items():
            assert torch.equal(returned["optimizer_state_dict"]["state"][index][key], values.float())
    assert convert_checkpoint.main(back) == 2  # the file is there already


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("tensor-parallel", "tensor_parallel_checkpoint_step_25.pth"),
        ("pipeline", "streaming_checkpoint_step_25.pth"),
    ],
)
def test_the_output_may_be_a_new_folder_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(fixture_config(25)))
    source = str(FIXTURES / "streaming_checkpoint_step_25.pth")
    arguments = ["--checkpoint-path", source, "--output", "new", "--to", form]
    assert convert_checkpoint.main([*arguments, "--model-config", "config.json"]) == 0
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.pth")] == [Path("new") / name]


def test_stages_are_converted_to_one_file(tmp_path: Path) -> None:
    write_stages(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODEL_CONFIG))
    arguments = ["--checkpoint-path", str(tmp_path), "--output", str(tmp_path / "ours.pth"), "--to"]
    assert convert_checkpoint.main([*arguments, "tensor-parallel", "--model-config", str(config)]) == 0
    assert_whole(open_any(tmp_path / "ours.pth"))


def test_not_finite_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = pipeline_checkpoint()
    checkpoint["model_state_dict"]["norm.weight"][3] = float("nan")
    torch.save(checkpoint, tmp_path / "in.pth")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODEL_CONFIG))
    arguments = ["--checkpoint-path", str(tmp_path / "in.pth"), "--output", str(tmp_path / "out.pth")]
    assert convert_checkpoint.main([*arguments, "--to", "pipeline", "--model-config", str(config)]) == 1
    assert "norm.weight holds NaN" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["config.json", "in.pth"]
    assert inspect_checkpoint.main([str(tmp_path / "in.pth")]) == 1
    assert inspect_checkpoint.main([str(tmp_path / "in.pth"), "--quick"]) == 0


def test_of_a_folder_of_checkpoints_the_newest_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (9, 10):
        save_sample(tmp_path, step)
    assert inspect_checkpoint.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_step"] == 10
    arguments = ["--checkpoint-path", str(tmp_path), "--output", str(tmp_path / "new"), "--to", "pipeline"]
    assert convert_checkpoint.main(arguments) == 0
    assert "step 10, " in capsys.readouterr().out


def test_inspect_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = save_sample(tmp_path)
    assert inspect_checkpoint.main([str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "tensor_parallel" and told["global_step"] == 7
    assert told["health"] == "whole; all values finite" and told["head"] == "tied to the embedding"
    assert told["shape"]["query_size"] == 24 and told["data_position"]["row"] == 3
    damaged = bytearray(path.read_bytes())
    damaged[50_000] ^= 1
    path.write_bytes(damaged)
    program = str(ROOT / "scripts" / "inspect_checkpoint.py")  # as a user starts it, from anywhere
    ended = subprocess.run([sys.executable, program, path], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: checkpoint ") and len(ended.stderr.splitlines()) == 1


def test_the_familys_checkpoint_is_converted_and_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FIXTURES / "family_checkpoint_step_20.pt"
    told = json.loads(source.with_suffix(".json").read_text())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(told["config"]))
    arguments = ["--checkpoint-path", str(source), "--output", str(tmp_path), "--to"]
    assert convert_checkpoint.main([*arguments, "tensor-parallel"]) == 1
    assert "give --model-config" in capsys.readouterr().err
    arguments += ["tensor-parallel", "--model-config", str(config)]
    assert convert_checkpoint.main(arguments) == 0
    original = torch.load(source, weights_only=True)
    converted = torch.load(tmp_path / "tensor_parallel_checkpoint_step_20.pth", weights_only=True)
    model = ArgonneModel(ArgonneConfig(**converted["model_config"]))
    model.load_state_dict(converted["model_state_dict"], strict=True)
    assert list(converted["model_state_dict"]) == list(original["model_state_dict"])
    for name, weight in original["model_state_dict"].items():
        assert torch.equal(converted["model_state_dict"][name], weight)
    for index, state in original["optimizer_state_dict"]["state"].items():
        for key, values in state.items():
            assert torch.equal(converted["optimizer_state_dict"]["state"][index][key], values)
    assert converted["scheduler_state_dict"] == {"step": 19} and "data_position" not in converted
    assert inspect_checkpoint.main([str(source), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (seen["kind"], seen["global_step"], seen["data_position"]) == ("family", 20, 0)
    assert seen["shape"]["head_dim"] == 16 and seen["shape"]["qk_norm"] and seen["shape"]["sandwich_norm"]
