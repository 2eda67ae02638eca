"""The command line: defaults, every problem at once, presets, and what it costs to ask for help."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from argonne.config.command_line import (
    build_parser,
    differing_flags,
    fingerprint,
    flag_values,
    parse_command_line,
)
from argonne.config.flags import duration, flag_table
from argonne.config.options import TrainingOptions, derive_accumulation
from argonne.config.presets import PRESETS, load_model_settings
from argonne.errors import ConfigError
from tests import ROOT

NEEDED = ["--tokenizer-path", "tok"]


def problems(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The error lines that a command line gives."""
    with pytest.raises(SystemExit) as stop:
        parse_command_line(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    return lines


def test_defaults_are_the_guides() -> None:
    config = parse_command_line(NEEDED)
    assert config.data.tokenizer_path == "tok"
    assert config.data.data_glob == "../data/CC-MAIN-2025-26/*.parquet"
    assert (config.training.batch_size, config.training.block_size) == (4, 4096)
    assert (config.training.learning_rate, config.training.min_learning_rate) == (1e-4, 1e-5)
    assert (config.training.warmup_steps, config.training.total_steps) == (2000, 4_000_000)
    assert (config.training.weight_decay, config.training.grad_clip) == (0.1, 1.0)
    assert config.training.adam_betas == (0.9, 0.999)
    assert config.data.streaming and config.data.packing and config.data.num_proc == 8
    assert config.checkpoint.checkpoint_path is None and config.checkpoint.keep_checkpoints == 3
    assert config.checkpoint.checkpoint_interval == 300
    assert (config.output.log_interval, config.output.sample_interval, config.output.output_dir) == (
        50,
        0,
        ".",
    )
    assert config.model.model_config is None and config.model.settings is None
    assert derive_accumulation(config.training, 3) == 1


def test_every_flag_reaches_its_field() -> None:
    config = parse_command_line(
        [
            *NEEDED,
            *"--no-streaming --no-packing --trust-remote-code --compile --sequence-parallel --debug".split(),
            *"--adam-betas 0.8 0.95 --dtype bf16 --local-rank 3 --max-run-time 23h30m --seed 7".split(),
            *"--gradient-accumulation-steps 2 --model-config argonne-tiny --min-learning-rate=0".split(),
        ]
    )
    assert not config.data.streaming and not config.data.packing and config.data.trust_remote_code
    assert config.parallel.compile and config.parallel.sequence_parallel and config.debug
    assert config.training.adam_betas == (0.8, 0.95) and config.training.dtype == "bf16"
    assert config.parallel.local_rank == 3 and config.control.max_run_time == 84_600.0
    assert config.model.settings == PRESETS["argonne-tiny"]
    assert config.training.min_learning_rate == 0.0
    assert parse_command_line([*NEEDED, "--local_rank", "3"]).parallel.local_rank == 3


def test_checkpoint_interval_depends_on_streaming() -> None:
    assert parse_command_line([*NEEDED, "--no-streaming"]).checkpoint.checkpoint_interval == 2000
    given = parse_command_line([*NEEDED, "--no-streaming", "--checkpoint-interval", "300"])
    assert given.checkpoint.checkpoint_interval == 300


def test_every_problem_is_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = problems(
        capsys,
        *"--lerning-rate 3 --batch-size -4 --learning-rate nan --block-size x --dtype int8".split(),
        *"--adam-betas 0.9 --teacher-path t --teacher-device-map auto stray".split(),
        *"--weight-decay -0.1 --seed".split(),
        *"--checkpoint-path c --force-from-scratch --warmup-steps 9 --total-steps 5".split(),
    )
    text = "\n".join(lines)
    for expected in (
        "--lerning-rate is not a flag: did you mean --learning-rate?",
        "--batch-size -4: must be at least 1",
        "--learning-rate nan: give a finite number",
        "--block-size x: give a whole number",
        "--dtype int8: choose fp32, bf16 or fp16",
        "--adam-betas: expected 2 arguments",
        "--teacher-path is refused: distillation does not exist yet",
        "--teacher-device-map is refused: distillation does not exist yet",
        "stray is not a flag",
        "--weight-decay -0.1: must be at least 0",
        "--seed: expected one argument",
        "--force-from-scratch contradicts --checkpoint-path c",
        "--warmup-steps 9 exceeds --total-steps 5",
        "--tokenizer-path is required",
    ):
        assert text.count(expected) == 1, f"{expected!r} not once in\n{text}"
    assert len(lines) == 14


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--learning-rate -inf", "--learning-rate"),
        ("--learning-rate inf", "finite"),
        ("--learning-rate 0", "above 0"),
        ("--adam-betas 0.9 1.0", "--adam-betas 1.0: must be below 1"),
        ("--min-learning-rate 1e-3", "exceeds --learning-rate"),
        ("--global-batch-size 6", "--global-batch-size 6 is not a multiple"),
        ("--grad-clip 0", "--grad-clip 0: must be above 0"),
        ("--max-run-time soon", "23h30m"),
        ("--batch", "not a flag"),  # no abbreviations
        ("--model-config argonne-3", "argonne-2.0"),
        ("--tensor-parallel-size 0", "at least 1"),
        ("--text-column=", "empty"),
        ("--activation-checkpointing some", "choose none, full or selective"),
    ],
)
def test_one_wrong_value(capsys: pytest.CaptureFixture[str], arguments: str, expected: str) -> None:
    lines = problems(capsys, *NEEDED, *arguments.split())
    assert len(lines) == 1 and expected in lines[0]


def test_a_short_run_may_end_within_the_default_warm_up() -> None:
    assert parse_command_line([*NEEDED, "--total-steps", "10"]).training.warmup_steps == 2000
    assert parse_command_line([*NEEDED, "--checkpoint-path", "NONE", "--force-from-scratch"])


def test_only_rank_0_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--nonsense"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""


def test_help_answers_without_torch_and_quickly() -> None:
    script = (
        "import sys, time\nbegan = time.perf_counter()\nimport argonne.config.command_line as run_config\n"
        "try: run_config.parse_command_line(['--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow', 'tqdm'} & set(sys.modules)\n"
        "print(heavy or 'light', time.perf_counter() - began)\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    ]
    last = [output.splitlines()[-1].split() for output in outputs]
    assert all(word == "light" for word, _ in last)
    assert min(float(seconds) for _, seconds in last) < 0.15
    for name in build_parser()._option_string_actions:
        assert name in outputs[0]


def test_the_table_has_every_flag_once() -> None:
    table = flag_table(build_parser())
    names = re.findall(r"^\| `(--[\w-]+)", table, flags=re.MULTILINE)
    assert len(names) == len(set(names)) > 40
    assert "| `--min-learning-rate X` | 1e-05 |" in table and "`--local_rank, --local-rank N`" in table
    assert "NAME\\|FILE" in table  # a bar inside a cell


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("23h30m", 84600), ("1d", 86400), ("5m1s", 301)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5", "30m1h", "5 apples", "1h30"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        duration(text)


@pytest.mark.parametrize(
    ("batch", "total", "dp_size", "accumulation"),
    [(4, 32, 2, 4), (1, 8, 8, 1), (2, None, 5, 1), (3, 36, 4, 3)],
)
def test_derived_accumulation(batch: int, total: int | None, dp_size: int, accumulation: int) -> None:
    assert (
        derive_accumulation(TrainingOptions(batch_size=batch, global_batch_size=total), dp_size)
        == accumulation
    )


def test_a_global_batch_that_cannot_be_split_is_refused_with_its_values() -> None:
    with pytest.raises(ConfigError, match=r"--global-batch-size 20 .* 4 x 2 model replicas = 8"):
        derive_accumulation(TrainingOptions(batch_size=4, global_batch_size=20), 2)
    with pytest.raises(ConfigError, match="leave it out"):
        derive_accumulation(TrainingOptions(global_batch_size=16, gradient_accumulation_steps=4), 2)


def test_ranks_started_differently_are_told_apart(tmp_path: Path) -> None:
    one = parse_command_line([*NEEDED, "--seed", "1"])
    same = parse_command_line([*NEEDED, "--seed", "1", "--local_rank", "5", "--debug"])
    other = parse_command_line([*NEEDED, "--seed", "2"])
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert differing_flags(flag_values(one), flag_values(other)) == ["--seed: 1 and 2"]
    path = tmp_path / "config.json"
    path.write_text('{"num_hidden_layers": 2}')
    before = fingerprint(parse_command_line([*NEEDED, "--model-config", str(path)]))
    path.write_text('{"num_hidden_layers": 3}')
    assert fingerprint(parse_command_line([*NEEDED, "--model-config", str(path)])) != before


def test_the_reference_shape() -> None:
    shape = PRESETS["argonne-2.0"]
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]) == (4080, 24, 11008)
    assert (shape["num_attention_heads"], shape["num_key_value_heads"]) == (24, 8)
    assert (shape["rope_theta"], shape["rms_norm_eps"], shape["max_position_embeddings"]) == (
        500000.0,
        1e-6,
        4096,
    )
    assert shape["tie_word_embeddings"] and not shape["attention_bias"] and not shape["mlp_bias"]
    hidden, layers, inner, head = 4080, 24, 11008, 170
    per_layer = hidden * head * (24 + 8 + 8 + 24) + 3 * hidden * inner + 2 * hidden
    assert 151_665 * hidden + layers * per_layer + hidden == 4_918_072_800
    assert "vocab_size" not in PRESETS["argonne-2.0"]


def write_config(folder: Path, **keys: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return str(path)


def test_a_config_file_is_completed_from_argonne_2(tmp_path: Path) -> None:
    path = write_config(
        tmp_path, num_hidden_layers=3, vocab_size=1000, architectures=["ArgonneModel"], torch_dtype="float32"
    )
    settings = load_model_settings(path)
    assert settings == {**PRESETS["argonne-2.0"], "num_hidden_layers": 3, "vocab_size": 1000}
    assert load_model_settings(str(tmp_path)) == settings
    rope = write_config(tmp_path, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, head_dim=None)
    assert load_model_settings(rope) == {**PRESETS["argonne-2.0"], "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"hidden_size": 0}, '"hidden_size" is 0'),
        ({"num_hidden_layers": -1, "rms_norm_eps": "x"}, '"rms_norm_eps" is "x"'),
        ({"hidden_size": 64.0}, "whole number"),
        ({"num_hidden_layers": True}, "whole number"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"num_attention_heads": 6}, "not a multiple"),
        ({"hidden_size": 72}, "head dimension 3 is odd"),
        ({"hidden_size": None}, '"hidden_size" is null'),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_a_config_file_with_a_wrong_value(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as refusal:
        load_model_settings(write_config(tmp_path, **keys))
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"])
def test_a_config_file_that_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="JSON"):
        load_model_settings(str(path))


def test_the_package_lists_every_module() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(package["tool"]["setuptools"]["py-modules"]) == sorted(
        path.stem for path in ROOT.glob("*.py")
    )


def test_constraints_hold_what_the_package_requires() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    names = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    extras = [name for group in package["optional-dependencies"].values() for name in group]
    for requirement in package["dependencies"] + extras:
        name, least = requirement.split(">=")
        version = [int(part) for part in names[name].split(".")[:2]]
        assert version >= [int(part) for part in least.split(".")], requirement


def test_environment_is_not_needed() -> None:
    clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import argonne.config.command_line as run_config; run_config.parse_command_line(['--bad'])",
        ],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("error: ") == 2
