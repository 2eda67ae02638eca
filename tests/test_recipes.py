"""The recipes that are shipped: what they ask for, scaled and rehearsed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.config.command_line import parse_recipe
from argonne.config.presets import PRESETS
from argonne.config.recipe import Recipe
from argonne.config.recipe_file import recipe_toml
from argonne.testing.launch import environment
from argonne.tools import rehearsal
from argonne.tools.rehearsal_scale import scale, scaled_blocks, scaled_model, stop_after, total_steps
from argonne.training.stages import plan_stages
from model import ArgonneConfig
from tests import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def recipe_of(name: str) -> Recipe:
    return parse_recipe(["--config", str(ROOT / "recipes" / name)])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_sound_and_explained(path: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(path)])
    degree = recipe.config.parallel.tensor_parallel_size
    assert isinstance(degree, int) and plan_stages(recipe, 8 // degree)
    assert path.read_text().count("#") > 10
    copy = tmp_path / "resolved.toml"
    copy.write_text(recipe_toml(recipe))
    again = parse_recipe(["--config", str(copy)])
    assert [stage.config.training for stage in again.stages] == [s.config.training for s in recipe.stages]
    assert [stage.config.data for stage in again.stages] == [s.config.data for s in recipe.stages]


def test_argonne_4_has_its_four_stages() -> None:
    recipe = recipe_of("argonne-4.0.toml")
    training = [stage.config.training for stage in recipe.stages]
    assert [options.total_tokens for options in training] == [
        38_030_000_000, 18_070_000_000, 6_020_000_000, 3_000_000_000,
    ]  # fmt: skip
    assert [options.block_size for options in training] == [1024, 1024, 13568, 65536]
    assert {(options.grad_clip, options.adam_betas, options.lr_schedule) for options in training} == {
        (0.4, (0.9, 0.95), "wsd")
    }
    mixture = {source.name: float(source.weight) for source in recipe.config.data.data_mix}
    assert mixture == {"edu": 0.5, "math": 0.3, "code": 0.2}
    assert "anneal" in {source.name for source in recipe.stages[1].config.data.data_mix}
    # Each stage ends in a cooldown of its own; the second is one from its first step.
    assert [options.cooldown_fraction for options in training] == [0.15, 1.0, 0.5, 0.5]


def test_argonne_2_is_the_guides_run() -> None:
    config = recipe_of("argonne-2.0.toml").config
    training = config.training
    assert (training.batch_size, training.block_size, training.total_steps) == (4, 4096, 160_000)
    assert (training.learning_rate, training.min_learning_rate) == (3e-4, 3e-5)
    assert (training.warmup_steps, training.weight_decay) == (2000, 0.1)
    assert config.data.tokenizer_path == "../Qwen2.5-3B-Instruct"
    assert config.data.data_glob == ("../data/CC-MAIN-2025-26/*.parquet",)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_scaled_model_keeps_its_switches(preset: str) -> None:
    real = PRESETS[preset]
    small = scaled_model(real, {1024: 64, 70000: 128})
    for key in ("qk_norm", "v_norm", "sandwich_norm", "logit_softcap", "tie_word_embeddings", "rope_theta"):
        assert small[key] == real[key]
    ratio = real["num_attention_heads"] // real["num_key_value_heads"]
    assert small["num_attention_heads"] // small["num_key_value_heads"] == ratio
    assert small["hidden_size"] == 64 and small["max_position_embeddings"] == 64
    ArgonneConfig(**small, vocab_size=100)


def test_a_scaled_recipe_keeps_its_stages(tmp_path: Path) -> None:
    recipe = recipe_of("argonne-4.0.toml")
    scaled = scale(recipe, tmp_path, processes=2, on_gpus=False)
    small = scaled.recipe
    assert [stage.name for stage in small.stages] == [stage.name for stage in recipe.stages]
    assert list(scaled_blocks(recipe).values()) == [64, 128, 256]
    assert [stage.config.training.block_size for stage in small.stages] == [64, 64, 128, 256]
    for mine, theirs in zip(small.stages, recipe.stages, strict=True):
        one, other = mine.config.training, theirs.config.training
        kept = (
            "lr_schedule",
            "learning_rate",
            "cooldown_fraction",
            "grad_clip",
            "adam_betas",
            "weight_decay",
        )
        assert [getattr(one, key) for key in kept] == [getattr(other, key) for key in kept]
        assert one.gradient_accumulation_steps == 2 and one.total_tokens is None
        weights = [[(s.name, s.weight) for s in each.config.data.data_mix] for each in (mine, theirs)]
        assert weights[0] == weights[1]
        assert all(list(Path("/").glob(s.glob.lstrip("/"))) for s in mine.config.data.data_mix)
    assert small.config.parallel.sequence_parallel
    assert small.config.parallel.tensor_parallel_size == 2
    places = [{s.name: s.glob for s in stage.config.data.data_mix} for stage in small.stages]
    assert places[0]["edu"] == places[1]["edu"] != places[0]["math"]
    notes = "\n".join(scaled.notes)
    assert "edu, math, code" in notes and "../Qwen3" in notes
    assert stop_after(small) < total_steps(small)


def test_data_that_is_here_is_used(tmp_path: Path) -> None:
    here = tmp_path / "shard.parquet"
    here.touch()
    recipe = recipe_of("argonne-2.0.toml")
    config = recipe.config
    data = dataclasses.replace(config.data, data_glob=(str(here),), tokenizer_path=str(tmp_path))
    stage = dataclasses.replace(recipe.stages[0], config=dataclasses.replace(config, data=data))
    scaled = scale(Recipe(stages=(stage,)), tmp_path, processes=1, on_gpus=False)
    assert scaled.recipe.config.data.data_glob == (str(here),)
    assert scaled.recipe.config.data.tokenizer_path == str(tmp_path)
    assert "data-glob" not in "".join(scaled.notes)


def test_a_part_that_does_not_hold_ends_the_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: rehearsal.Rehearsal) -> str:
        raise ValueError("no luck\nat all")

    monkeypatch.setattr(rehearsal.Rehearsal, "train_and_stop", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = rehearsal.main(["--config", str(ROOT / "recipes" / "argonne-2.0.toml"), "--rehearse"])
    out, err = capsys.readouterr()
    assert code == 1 and "train and stop  FAIL  no luck at all" in out and "resume  " not in out
    assert err.startswith("error: the rehearsal did not hold: its files and logs are in ")
    assert Path(err.split()[-1]).is_dir()


def test_ranks_beside_rank_0_leave_the_rehearsal_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert rehearsal.main(["--config", str(RECIPES[0]), "--rehearse"]) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_rehearses(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "resume_pretrain_tensor.py"), "--config", str(path), "--rehearse"],
        env={**environment(), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("train and stop", "resume", "validate", "save", "export", "generate"):
        assert f"\n{part:<14}  ok    " in done.stdout
    assert not os.listdir(tmp_path)
