"""Recipe files: every flag as a key, layers and stages, what is wrong with its place, and the way back."""

from pathlib import Path

import pytest

from argonne.config.command_line import build_parser, parse_recipe
from argonne.config.recipe import Recipe, overlay, recipe_values
from argonne.config.recipe_file import recipe_toml

TOP = """
tokenizer-path = "tok"
model_config = "argonne-tiny"
adam-betas = [0.9, 0.95]
no-streaming = false
sequence-parallel = true
lr-schedule = "wsd"
cooldown-fraction = 0.1
max-run-time = "1h"
seed = 7
"""
STAGES = """
[eval-data]
web = "a/*.parquet"

[[stage]]
name = "one"
total-tokens = 38.03e9
block_size = 1024

[[stage]]
name = "two"
total-steps = 10_000
lr-schedule = "linear"
warmup-steps = 0
reset-optimizer = true

[stage.eval-data]
code = { glob = "c" }
"""


def recipe_of(tmp_path: Path, text: str, *arguments: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return parse_recipe(["--config", str(path), *arguments])


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, *arguments: str) -> list[str]:
    """The error lines of a recipe, without the path of its file."""
    with pytest.raises(SystemExit) as stop:
        recipe_of(tmp_path, text, *arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ").replace(f"{tmp_path}/", "") for line in lines]


def test_keys_of_a_file_are_flags(tmp_path: Path) -> None:
    config = recipe_of(tmp_path, TOP).config
    assert config.training.adam_betas == (0.9, 0.95) and config.training.seed == 7
    assert config.data.streaming and config.parallel.sequence_parallel
    assert config.control.max_run_time == 3600.0
    assert config.model.settings is not None and config.model.settings["hidden_size"] == 128


def test_the_command_line_wins_also_where_it_says_the_same_in_another_way(tmp_path: Path) -> None:
    given = ["--seed", "9", "--total-tokens", "1000", "--eval-data", "x=y"]
    recipe = recipe_of(tmp_path, TOP + STAGES, *given)
    assert [stage.config.training.seed for stage in recipe.stages] == [9, 9]
    assert [stage.config.training.total_tokens for stage in recipe.stages] == [1000, 1000]
    assert [stage.config.evaluation.eval_data for stage in recipe.stages] == [(("x", "y"),)] * 2
    assert recipe_of(tmp_path, "no-packing = true", "--tokenizer-path", "t").config.data.packing is False


def test_stages_lie_over_the_top(tmp_path: Path) -> None:
    one, two = recipe_of(tmp_path, TOP + STAGES).stages
    assert (one.name, two.name, one.reset_optimizer, two.reset_optimizer) == ("one", "two", False, True)
    assert one.config.training.total_tokens == 38_030_000_000
    assert (one.config.training.lr_schedule, one.config.training.cooldown_fraction) == ("wsd", 0.1)
    assert (two.config.training.lr_schedule, two.config.training.cooldown_fraction) == ("linear", None)
    assert (two.config.training.total_tokens, two.config.training.total_steps) == (None, 10_000)
    assert one.config.evaluation.eval_data == (("web", "a/*.parquet"),)
    assert two.config.evaluation.eval_data == (("code", "c"),)


def test_a_run_without_a_file_is_one_stage_without_a_name() -> None:
    recipe = parse_recipe(["--tokenizer-path", "t"])
    assert [stage.name for stage in recipe.stages] == [""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning-rate = 3", "recipe.toml: lerning-rate is not a key: did you mean learning-rate?"),
        ("zzz = 3", "recipe.toml: zzz is not a key: did you mean "),
        ("config = 'x'", "recipe.toml: config is not a key: did you mean "),
        ("stages = []", "recipe.toml: stages is not a key: did you mean stage?"),
        ("stage = 1", 'recipe.toml: "stage" is no list of tables: write [[stage]]'),
        ("learning-rate = -3.0", "recipe.toml: --learning-rate -3.0: must be above 0"),
        ("learning-rate = 'fast'", "recipe.toml: --learning-rate fast: give a number"),
        ("learning-rate = true", "recipe.toml: learning-rate: give a text or a number"),
        ("learning-rate = [1.0]", "recipe.toml: learning-rate: give a text or a number"),
        ("batch-size = 1.5", "recipe.toml: --batch-size 1.5: give a whole number"),
        ("seed = 1979-05-27", "recipe.toml: seed: give a text or a number"),
        ("adam-betas = [0.9]", "recipe.toml: adam-betas: give 2 values"),
        ("adam-betas = [0.9, 1.5]", "recipe.toml: --adam-betas 1.5: must be below 1"),
        ("compile = 1", "recipe.toml: compile: give true or false"),
        ("block-size = 8\nblock_size = 16", "recipe.toml: block_size is given twice: leave one out"),
        ("dtype = 'int8'", "recipe.toml: --dtype int8: choose fp32, bf16 or fp16"),
        ("distill-alpha = 0.4", "--distill-alpha needs a teacher"),
        (
            "teacher-targets = 'DIR'\n[[stage]]\nname = 'a'\n[[stage]]\nname = 'b'",
            "--teacher-targets DIR is of one stream, and the recipe has 2 stages: run them one by one",
        ),
        ("[eval-data]\nweb = 3", "recipe.toml: eval-data.web: give glob, and a name without ="),
        ("[training]\nseed = 3", "recipe.toml: training is not a key: did you mean "),
        ("[seed]\nx = 3", "recipe.toml: seed: give a text or a number"),
        ("[[stage]]\nblock-size = 8", "recipe.toml: stage 1 has no name: give it one"),
        ("[[stage]]\nname = 'a'\n[[stage]]\nname = 'a'", "recipe.toml: two stages are named a: rename one"),
        (
            "[[stage]]\nname = 'a'\ncompile = true",
            "recipe.toml, stage a: compile holds for the whole run: give it above the first [[stage]]",
        ),
        (
            "[[stage]]\nname = 'a'\nblok-size = 8",
            "recipe.toml, stage a: blok-size is not a key: did you mean block-size?",
        ),
        (
            "[[stage]]\nname = 'a'\nblock-size = 1",
            "recipe.toml, stage a: --block-size 1: must be at least 2",
        ),
        (
            "[[stage]]\nname = 'a'\nreset-optimizer = 1",
            "recipe.toml, stage a: reset-optimizer: give true or false",
        ),
        (
            "[[stage]]\nname = 'a'\n[[stage]]\nname = 'b'\nmin-learning-rate = 1.0",
            "stage b: --min-learning-rate 1 exceeds --learning-rate",
        ),
    ],
)
def test_one_wrong_key(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    (line,) = refused(tmp_path, capsys, text, "--tokenizer-path", "t")
    assert line.startswith(expected)


def test_every_problem_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "seed = -1\nbatch-sise = 2\n[[stage]]\nname = 'a'\nblock-size = 0\n[[stage]]\nname = 'b'"
    lines = refused(tmp_path, capsys, text, "--grad-clip", "0")
    assert len(lines) == 5 and sum("--tokenizer-path is required" in line for line in lines) == 1


@pytest.mark.parametrize("content", [b"seed = ", b"seed = 1\nseed = 2", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        parse_recipe(["--config", str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: --config {path} ")


def test_every_flag_is_a_key(tmp_path: Path) -> None:
    """Each is known, written with - or _, whatever its value would have to be."""
    flags = [name.removeprefix("--") for name in build_parser()._option_string_actions if name != "-h"]
    for flag in {*flags} - {"help", "config", "rehearse"}:
        for key in (flag, flag.replace("-", "_")):
            try:
                recipe_of(tmp_path, f"{key} = 2000-01-01", "--tokenizer-path", "t")
            except SystemExit:
                continue
            raise AssertionError(key)


def test_flags_are_known_by_both_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("text-column", "text_column"):
        assert recipe_of(tmp_path, f"{key} = 'x'", "--tokenizer-path", "t").config.data.text_column == "x"
    assert "is not a key" not in "".join(refused(tmp_path, capsys, "local_rank = -1"))


def test_the_resolved_configuration_repeats_the_run(tmp_path: Path) -> None:
    awkward = 'text-column = "a\\"b\\\\c\\u007f\\n\u00e9"\n'
    recipe = recipe_of(tmp_path, awkward + TOP + STAGES, "--grad-clip", "0.4", "--debug", "--no-packing")
    text = recipe_toml(recipe)
    again = recipe_of(tmp_path, text)
    expected = {key: value for key, value in recipe_values(recipe).items() if "--config" not in key}
    assert {key: value for key, value in recipe_values(again).items() if "--config" not in key} == expected
    assert again.config.debug and recipe_toml(again) == text
    assert "rehearse" not in text and "\nconfig =" not in text


def test_layers_take_back_what_says_the_same() -> None:
    below = {"total_steps": 5, "cooldown_steps": 2, "global_batch_size": 8, "seed": 1}
    assert overlay(below, {"total_tokens": 9}) == {
        "cooldown_steps": 2, "global_batch_size": 8, "seed": 1, "total_tokens": 9,
    }  # fmt: skip
    assert overlay(below, {"lr_schedule": "cosine"}).keys() == below.keys() - {"cooldown_steps"} | {
        "lr_schedule"
    }
    assert overlay({"total_tokens": 9}, {"total_steps": 5}, {"seed": 2}) == {"total_steps": 5, "seed": 2}
    assert overlay({"teacher_targets": "DIR"}, {"teacher_path": "T"}) == {"teacher_path": "T"}


def test_ranks_with_other_files_are_told_apart(tmp_path: Path) -> None:
    one = recipe_values(recipe_of(tmp_path, TOP + STAGES))
    other = recipe_values(recipe_of(tmp_path, TOP + STAGES.replace("10_000", "10_001")))
    assert {key for key in one if one[key] != other[key]} == {"--total-steps of stage two"}
    reset = recipe_values(recipe_of(tmp_path, TOP + STAGES.replace("optimizer = true", "optimizer = false")))
    assert {key for key in one if one[key] != reset[key]} == {"the stages"}


@pytest.mark.parametrize("column", ["token-column", "text-column"])
def test_the_configuration_of_a_run_of_one_column_repeats_it(tmp_path: Path, column: str) -> None:
    recipe = parse_recipe(["--tokenizer-path", "tok", f"--{column}", "ids"])
    again = recipe_of(tmp_path, recipe_toml(recipe))
    assert recipe_values(again) | {"--config": None} == recipe_values(recipe)
