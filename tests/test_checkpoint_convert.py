"""Pipeline checkpoints in, out and through: parts, shapes, both ways, and the scripts."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import FIXTURES, MODEL_CONFIG, sample_shapes, save_sample, unsharded
from corpus import build_tokenizer
from torch import Tensor

from checkpoint_export import export_hf, plan_shards, quiet_transformers
from checkpoint_layout import CheckpointReader, check_model_config, infer_model_config, open_checkpoint
from checkpoint_parts import cut_dimension, open_any, part_name
from checkpointing import choose_checkpoint
from model import ArgonneConfig, ArgonneModel
from run_errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parent.parent


def fixture_config(step: int) -> dict[str, Any]:
    told = json.loads((FIXTURES / f"streaming_checkpoint_step_{step}.json").read_text())
    config: dict[str, Any] = told["config"]
    return config


def pipeline_checkpoint(tied: bool = False) -> dict[str, Any]:
    """What a pipeline script saves, for the sample model."""
    names = list(sample_shapes(tied))
    weights = {name: unsharded(name, "param") for name in names}
    if tied:
        weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
    return {
        "global_step": 12,
        "tokens_processed": 999,
        "model_state_dict": weights,
        "optimizer_state_dict": {"state": adam_state(names), "param_groups": [group(range(len(names)))]},
        "scheduler_state_dict": {"step": 11},
        "loss": 3.25,
        "data_position": {"streaming": True, "current_file_idx": 1, "position_in_file": 5, "chunk_offset": 2},
        "model_dtype": "torch.float32",
    }


def adam_state(names: Any) -> dict[int, dict[str, Tensor]]:
    return {
        index: {
            "step": torch.tensor(12.0),
            "exp_avg": unsharded(name, "exp_avg"),
            "exp_avg_sq": unsharded(name, "exp_avg_sq"),
        }
        for index, name in enumerate(names)
    }


def group(indices: Any) -> dict[str, Any]:
    return {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "params": list(indices)}


def assert_whole(reader: CheckpointReader, tied: bool = False, adam: bool = True) -> None:
    """The reader shows the sample model's every weight and Adam state."""
    assert reader.tied == tied and set(reader.names) == set(sample_shapes(tied))
    assert reader.step == 12 and bool(reader.adam) == adam
    for name, shape in sample_shapes(tied).items():
        origin = (0,) * len(shape)
        assert torch.equal(reader.read(name, origin, shape), unsharded(name, "param")), name
        for key in ("exp_avg", "exp_avg_sq") if adam else ():
            assert torch.equal(reader.read_optimizer(name, key, origin, shape), unsharded(name, key)), name


# ----------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("step", [25, 40])
def test_shape_is_read_from_a_pipeline_checkpoints_tensors(step: int) -> None:
    config = fixture_config(step)
    reader = open_checkpoint(FIXTURES / f"streaming_checkpoint_step_{step}.pth")
    heads = {key: config[key] for key in ("num_attention_heads", "num_key_value_heads", "rope_theta")}
    inferred = infer_model_config(reader, {**heads, "max_position_embeddings": 32})
    assert inferred == config
    check_model_config(inferred, config, reader.path)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is . in the checkpoint and 9 in"):
        check_model_config(inferred, {**config, "num_hidden_layers": 9, "rms_norm_eps": None}, reader.path)
    with pytest.raises(CheckpointError, match="7 query and 7 key/value heads"):
        infer_model_config(reader, {"num_attention_heads": 7, "num_key_value_heads": 7})
    with pytest.raises(CheckpointError, match="does not say how many heads"):
        infer_model_config(reader, {})


def test_an_early_checkpoint_whose_query_is_not_square(tmp_path: Path) -> None:
    """Hidden 4096 over 24 heads gives 170 a head and 4080 rows; here 50 over 8 gives 6 and 48."""
    config = ArgonneConfig(**{**MODEL_CONFIG, "hidden_size": 50, "num_attention_heads": 8, "head_dim": None},
                           tie_word_embeddings=False)  # fmt: skip
    model = ArgonneModel(config)
    path = tmp_path / "streaming_checkpoint_step_1.pth"
    torch.save({"model_state_dict": model.state_dict(), "global_step": 1}, path)
    inferred = infer_model_config(
        open_checkpoint(path), {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 4080}
    )
    assert (inferred["hidden_size"], inferred["head_dim"], inferred["tie_word_embeddings"]) == (50, 6, False)


def test_two_parameter_groups_are_matched_by_shape(tmp_path: Path) -> None:
    checkpoint = pipeline_checkpoint()
    names = list(sample_shapes(tied=False))
    matrices = [name for name in names if unsharded(name, "param").ndim == 2]
    vectors = [name for name in names if name not in matrices]
    count = len(matrices)
    checkpoint["optimizer_state_dict"] = {
        "state": adam_state(matrices + vectors),
        "param_groups": [group(range(count)), group(range(count, len(names)))],
    }
    path = tmp_path / "streaming_checkpoint_step_12.pth"
    torch.save(checkpoint, path)
    assert_whole(open_any(path))


@pytest.mark.parametrize(("change", "message"), [("drop", "counts 20 parameters"), ("swap", "exp_avg of ")])
def test_optimizer_state_that_does_not_fit_is_an_error(tmp_path: Path, change: str, message: str) -> None:
    checkpoint = pipeline_checkpoint()
    state = checkpoint["optimizer_state_dict"]
    if change == "drop":
        state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:20]
    else:
        state["state"][0], state["state"][1] = state["state"][1], state["state"][0]
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        open_any(tmp_path / "a.pth")


def test_missing_layers_and_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = pipeline_checkpoint()
    checkpoint.pop("optimizer_state_dict")
    weights = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {name.replace("blocks.1", "blocks.4"): w for name, w in weights.items()}
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="layers 1-3 of 5 are not in it"):
        infer_model_config(open_any(tmp_path / "a.pth"), MODEL_CONFIG)
    torch.save({"global_step": 3}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no model_state_dict: not a training checkpoint"):
        open_any(tmp_path / "b.pth")


# ----------------------------------------------------------------------------------------------------------
# Pipeline stages


def write_stages(
    folder: Path, *, local_numbers: bool = False, named: bool = True, by_keys: bool = False
) -> list[Path]:
    """The sample cut into two stages: embedding and layer 0; layer 1, norm and head."""
    whole = pipeline_checkpoint()
    names = list(sample_shapes(tied=False))
    last = [name for name in names if name.startswith(("blocks.1", "norm", "lm_head"))]
    paths = []
    for stage, own in enumerate(([name for name in names if name not in last], last)):
        number = {name: name.replace("blocks.1.", "blocks.0.") if local_numbers else name for name in own}
        part = {**whole, "model_state_dict": {number[name]: unsharded(name, "param") for name in own}}
        part["optimizer_state_dict"] = {"state": adam_state(own), "param_groups": [group(range(len(own)))]}
        if by_keys or local_numbers:
            part |= {"pipeline_stage": stage, "num_stages": 2, "layer_range": [stage, stage + 1]}
        name = f"streaming_checkpoint_step_12_stage_{stage}_of_2.pth" if named else f"part{stage}.pth"
        torch.save(part, folder / name, _use_new_zipfile_serialization=bool(stage))
        paths.append(folder / name)
    return paths


@pytest.mark.parametrize("local_numbers", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_stages_are_joined(tmp_path: Path, local_numbers: bool, named: bool) -> None:
    paths = write_stages(tmp_path, local_numbers=local_numbers, named=named, by_keys=not named)
    assert_whole(open_any(tmp_path))
    if named:
        assert_whole(open_any(paths[1]))
        choice = choose_checkpoint(str(tmp_path), tmp_path)
        assert choice.reader is not None
        assert_whole(choice.reader)
    else:
        with pytest.raises(CheckpointError, match="it is stage 1 of 2 only"):
            open_any(paths[1])


def test_missing_double_and_contradictory_stages_are_named(tmp_path: Path) -> None:
    paths = write_stages(tmp_path)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(paths[1], moved)
    with pytest.raises(CheckpointError, match="stage 1 of 2 is missing"):
        open_any(paths[0])
    with pytest.raises(CheckpointError, match="stage 0 of 2 is missing"):
        open_any(moved)
    (tmp_path / paths[1].name).symlink_to(moved / paths[1].name)
    with pytest.raises(CheckpointError, match="is a link that leaves its folder"):
        open_any(paths[0])
    shutil.move(moved / paths[1].name, paths[1])
    shutil.copy(paths[1], tmp_path / "streaming_checkpoint_step_12_stage_1.pth")
    with pytest.raises(CheckpointError, match="stage 1 is there twice"):
        open_any(paths[0])
    (tmp_path / "streaming_checkpoint_step_12_stage_1.pth").unlink()
    shutil.copy(paths[0], paths[1])
    with pytest.raises(CheckpointError, match=r"layer 0 is in stage 0 .* and in stage 1"):
        open_any(paths[0])


def test_a_stage_whose_layers_are_not_its_range_is_refused(tmp_path: Path) -> None:
    paths = write_stages(tmp_path, by_keys=True)
    stage = torch.load(paths[1], weights_only=True)
    torch.save({**stage, "layer_range": [2, 3]}, paths[1])
    with pytest.raises(
        CheckpointError, match=r"layers 1 of 3 are not in it|says layers 2-2 and holds others"
    ):
        open_any(tmp_path)
    torch.save({**stage, "global_step": 13}, paths[1])
    with pytest.raises(CheckpointError, match="its parts are of different steps"):
        open_any(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# The public tensor-parallel script's slices


def write_ranks(folder: Path, count: int = 2) -> list[Path]:
    """The sample cut as that script cuts: rows or columns, the last rank taking the rest."""
    paths = []
    for rank in range(count):
        part = pipeline_checkpoint()

        def cut(name: str, tensor: Tensor, rank: int = rank) -> Tensor:
            dimension = cut_dimension(name)
            if dimension is None:
                return tensor
            chunk = tensor.shape[dimension] // count
            stop = tensor.shape[dimension] if rank == count - 1 else (rank + 1) * chunk
            return tensor.narrow(dimension, rank * chunk, stop - rank * chunk).clone()

        weights = part["model_state_dict"]
        part["model_state_dict"] = {
            "base_model." + name: cut(name, tensor) for name, tensor in weights.items()
        }
        for index, name in enumerate(weights):
            state = part["optimizer_state_dict"]["state"][index]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = cut(name, state[key])
        path = folder / f"tensor_parallel_checkpoint_step_12_rank_{rank}_of_{count}.pth"
        torch.save(part, path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_slices_are_joined(tmp_path: Path, count: int) -> None:
    paths = write_ranks(tmp_path, count)
    assert_whole(open_any(tmp_path))
    assert_whole(open_any(paths[-1]))
    reader = open_any(paths[0])
    assert torch.equal(
        reader.read("blocks.1.mlp.down_proj.weight", (3, 10), (5, 30)),
        unsharded("blocks.1.mlp.down_proj.weight", "param")[3:8, 10:40],
    )
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=f"rank 0 of {count} is missing"):
        open_any(paths[1])


def test_ranks_that_drifted_apart_are_reported(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path)
    part = torch.load(paths[1], weights_only=True)
    part["model_state_dict"]["base_model.norm.weight"] += 1
    torch.save(part, paths[1])
    assert open_any(tmp_path).warnings == (
        "1 weights that all 2 ranks share differ between them; rank 0's are taken",
    )


def test_one_ranks_slices_alone_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "tensor_parallel_checkpoint_step_12.pth"
    shutil.move(write_ranks(tmp_path)[0], path)
    heads = {key: MODEL_CONFIG[key] for key in ("num_attention_heads", "num_key_value_heads")}
    with pytest.raises(CheckpointError, match=r"one of 2 tensor-parallel ranks .12 of 24 query rows"):
        infer_model_config(open_any(path), heads)


def test_part_names() -> None:
    for name, whole, kind, index, count in (
        ("streaming_checkpoint_step_5_stage_1_of_4.pth", "streaming_checkpoint_step_5.pth", "stage", 1, 4),
        ("streaming_checkpoint_stage2_step_5.pth", "streaming_checkpoint_step_5.pth", "stage", 2, None),
        ("x_step_5_tp_rank_0_of_8.pth", "x_step_5.pth", "rank", 0, 8),
        ("x_step_5-rank-3.pth", "x_step_5.pth", "rank", 3, None),
    ):
        part = part_name(name)
        assert part is not None
        assert (part.whole, part.kind, part.index, part.count) == (whole, kind, index, count)
    assert part_name("streaming_checkpoint_step_5.pth") is None
    assert part_name("tensor_parallel_checkpoint_step_5.pth") is None


# ----------------------------------------------------------------------------------------------------------
# Scripts


def script(name: str) -> Any:
    """A script of ``scripts/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("step", [25, 40])
def test_pipeline_to_ours_and_back_bit_for_bit(tmp_path: Path, step: int) -> None:
    convert_checkpoint = script("convert_checkpoint")
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


def test_stages_are_converted_to_one_file(tmp_path: Path) -> None:
    convert_checkpoint = script("convert_checkpoint")

    write_stages(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODEL_CONFIG))
    arguments = ["--checkpoint-path", str(tmp_path), "--output", str(tmp_path / "ours.pth"), "--to"]
    assert convert_checkpoint.main([*arguments, "tensor-parallel", "--model-config", str(config)]) == 0
    assert_whole(open_any(tmp_path / "ours.pth"))


def test_not_finite_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint, inspect_checkpoint = script("convert_checkpoint"), script("inspect_checkpoint")

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


def test_inspect_tells_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = save_sample(tmp_path)
    assert script("inspect_checkpoint").main([str(path), "--json"]) == 0
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


# ----------------------------------------------------------------------------------------------------------
# Export


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.mark.parametrize("step", [25, pytest.param(40, marks=pytest.mark.slow)])
def test_an_export_opens_outside_the_repository(tmp_path: Path, tokenizer: Path, step: int) -> None:
    source = FIXTURES / f"streaming_checkpoint_step_{step}.pth"
    config = fixture_config(step)
    exported = tmp_path / "exported"
    with quiet_transformers():
        export_hf(open_any(source), config, str(tokenizer), exported, dtype=torch.float32)
    program = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True).eval()
tokens = torch.arange(20).reshape(2, 10)
tokenizer = AutoTokenizer.from_pretrained({str(exported)!r})
assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
model.generate(tokens, max_new_tokens=3, do_sample=False)
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, "logits.pt")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    model = ArgonneModel(ArgonneConfig(**config)).eval()
    weights = torch.load(source, weights_only=True)["model_state_dict"]
    model.load_state_dict(
        {name.removeprefix("_orig_mod."): weight.float() for name, weight in weights.items()}
    )
    with torch.no_grad():
        expected = model(input_ids=torch.arange(20).reshape(2, 10)).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_a_large_export_is_cut_into_shards(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoint_export.plan_shards", lambda sizes: plan_shards(sizes, limit=8000))
    path, _ = save_sample(tmp_path)
    reader = open_any(path)
    folder = tmp_path / "exported"
    config = {**MODEL_CONFIG, "tie_word_embeddings": True, "vocab_size": 101}
    with quiet_transformers():
        export_hf(reader, config, str(tokenizer), folder, dtype=torch.float32)
        assert len(list(folder.glob("model-*.safetensors"))) > 3
        model = ArgonneModel.from_pretrained(folder)
        export_hf(reader, config, str(tokenizer), folder)  # an earlier export is replaced
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, unsharded(name, "param"))
    assert plan_shards({"a": 5, "b": 6, "c": 3, "d": 20, "e": 1}, 10) == [["a"], ["b", "c"], ["d"], ["e"]]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["exported", path.name]


def test_an_export_never_touches_a_foreign_folder(tmp_path: Path, tokenizer: Path) -> None:
    path, _ = save_sample(tmp_path / "in")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="foreign is not empty"):
        export_hf(open_any(path), MODEL_CONFIG, str(tokenizer), foreign)
    with pytest.raises(ConfigError, match="--tokenizer-path"):
        export_hf(open_any(path), MODEL_CONFIG, str(tmp_path / "nowhere"), tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["foreign", "in"]
    assert os.listdir(foreign) == ["thesis.tex"]


def test_export_script(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sample(tmp_path / "in")
    export = script("export_hf")
    arguments = [
        "--checkpoint-path",
        str(tmp_path / "in"),
        "--tokenizer-path",
        str(tokenizer),
        "--output-dir",
    ]
    assert export.main([*arguments, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    capsys.readouterr()
    assert export.main([*arguments, str(tmp_path / "tiny"), "--model-config", "argonne-tiny"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: checkpoint ") and len(told.splitlines()) == 1
    assert "hidden_size is 24 in the checkpoint and 128 in --model-config" in told
    arguments[1] = "NONE"
    assert export.main([*arguments, str(tmp_path / "none")]) == 2
