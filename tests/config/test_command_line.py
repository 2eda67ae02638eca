"""The command line: every flag, every problem at once, and help without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.config.command_line import build_parser, parse_command_line
from argonne.config.presets import PRESETS
from argonne.config.recipe import flag_values
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


def test_every_flag_reaches_its_field() -> None:
    config = parse_command_line(
        [
            *NEEDED,
            *"--eval-data web=a/*.parquet code=b=c --eval-data more=d --eval-interval 0".split(),
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
    assert config.evaluation.eval_data == (("web", "a/*.parquet"), ("code", "b=c"), ("more", "d"))
    assert config.evaluation.eval_interval == 0
    assert parse_command_line([*NEEDED, "--local_rank", "3"]).parallel.local_rank == 3


@pytest.mark.parametrize("flags", [("--tokenizer-path",), ("--tokenizer-pth", "x"), ("--config",)])
def test_what_is_written_wrongly_is_not_called_missing(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    (line,) = problems(capsys, *flags)
    assert line.startswith(f"error: {flags[0]}")


def test_every_problem_is_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = problems(
        capsys,
        *"--lerning-rate 3 --batch-size -4 --learning-rate nan --block-size x --dtype int8".split(),
        *"--adam-betas 0.9 --teacher-path t --teacher-device-map gpu --distill-alpha 2 stray".split(),
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
        "--teacher-device-map gpu: choose local, auto, tensor-parallel or cpu",
        "--distill-alpha 2: must be at most 1",
        "stray is not a flag",
        "--weight-decay -0.1: must be at least 0",
        "--seed: expected one argument",
        "--force-from-scratch contradicts --checkpoint-path c",
        "--warmup-steps 9 exceeds --total-steps 5",
        "--tokenizer-path is required",
    ):
        assert text.count(expected) == 1, f"{expected!r} not once in\n{text}"
    assert len(lines) == 14


def test_a_pattern_that_the_shell_expanded_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{index}.parquet" for index in range(4)]
    for file in files:
        file.touch()
    lines = problems(capsys, "--tokenizer-path", "t", "--data-glob", *map(str, files))
    assert lines == [f"error: {files[1]} is not a flag (nor are 2 others): quote a pattern of files"]
    lines = problems(capsys, "--tokenizer-path", "t", "stray")
    assert lines == ["error: stray is not a flag: remove it, or see --help"]


def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = problems(capsys, "--config", str(tmp_path / "none.toml"))
    assert "none.toml cannot be read" in line
    (tmp_path / "broken.toml").write_text("seed = = 3")
    (line,) = problems(capsys, "--config", str(tmp_path / "broken.toml"))
    assert "is not valid TOML" in line
    (tmp_path / "empty.toml").write_text("")
    (line,) = problems(capsys, "--config", str(tmp_path / "empty.toml"))
    assert "--tokenizer-path is required" in line


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
        ("--eval-data web", "--eval-data web: give NAME=GLOB"),
        ("--eval-data web=a code=b --eval-data web=c", "--eval-data names web twice"),
        ("--eval-data", "--eval-data: expected at least one argument"),
        ("--lr-schedule step", "choose cosine, wsd, linear or constant"),
        ("--lr-schedule wsd", "--lr-schedule wsd needs --cooldown-steps or --cooldown-fraction"),
        ("--cooldown-steps 5", "--cooldown-steps is of --lr-schedule wsd, and the schedule is cosine"),
        ("--lr-schedule linear --cooldown-fraction 0.1", "--cooldown-fraction is of --lr-schedule wsd"),
        ("--lr-schedule wsd --cooldown-fraction 1.01", "--cooldown-fraction 1.01: must be at most 1"),
        ("--lr-schedule wsd --cooldown-steps -1", "--cooldown-steps -1: must be at least 0"),
        (
            "--lr-schedule wsd --cooldown-steps 2 --cooldown-fraction 0.1",
            "--cooldown-steps contradicts --cooldown-fraction",
        ),
        (
            "--lr-schedule wsd --cooldown-steps 11 --total-steps 10",
            "--cooldown-steps 11 exceeds --total-steps 10",
        ),
        ("--total-steps 5 --total-tokens 5000", "--total-steps contradicts --total-tokens"),
        ("--total-tokens 0", "--total-tokens 0: must be at least 1"),
        ("--activation-checkpointing some", "choose none, full or selective"),
        ("--async-tp", "--async-tp needs --compile and --sequence-parallel: add them"),
        ("--async-tp --compile", "--async-tp needs --sequence-parallel: add it"),
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


def test_help_answers_without_torch() -> None:
    script = (
        "import sys\nimport resume_pretrain_tensor\n"
        "try: resume_pretrain_tensor.main(['--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pyarrow', 'tqdm'} & set(sys.modules)\n"
        "print(heavy or 'light')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "light"
    for name in build_parser()._option_string_actions:
        assert name in done.stdout


def test_ranks_started_differently_are_told_apart(tmp_path: Path) -> None:
    one = parse_command_line([*NEEDED, "--seed", "1"])
    same = parse_command_line([*NEEDED, "--seed", "1", "--local_rank", "5", "--debug"])
    other = parse_command_line([*NEEDED, "--seed", "2"])
    assert flag_values(one) == flag_values(same)
    assert {key for key, value in flag_values(one).items() if flag_values(other)[key] != value} == {"--seed"}
    path = tmp_path / "config.json"
    path.write_text('{"num_hidden_layers": 2}')
    before = flag_values(parse_command_line([*NEEDED, "--model-config", str(path)]))
    path.write_text('{"num_hidden_layers": 3}')
    assert flag_values(parse_command_line([*NEEDED, "--model-config", str(path)])) != before


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


def test_what_is_said_of_a_teacher_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--teacher-device-map cpu --teacher-dtype bf16 --distill-temperature 2".split()
    assert problems(capsys, *NEEDED, *flags) == [
        f"error: {flag} needs a teacher: give --teacher-path, or leave it out"
        for flag in ("--teacher-device-map", "--teacher-dtype", "--distill-temperature")
    ]
    assert (
        parse_command_line([*NEEDED, *flags, "--teacher-path", "t"]).distillation.distill_temperature == 2.0
    )


def test_a_teacher_that_runs_and_stored_targets_are_two(capsys: pytest.CaptureFixture[str]) -> None:
    stored = [*NEEDED, "--teacher-targets", "DIR"]
    found = problems(capsys, *stored, "--teacher-path", "t", "--teacher-dtype", "bf16")
    assert len(found) == 1
    assert found[0].startswith("error: --teacher-targets DIR contradicts --teacher-path t: leave one out")
    assert problems(capsys, *stored, *"--teacher-device-map cpu --teacher-dtype bf16".split()) == [
        f"error: {flag} is about a teacher that runs: leave it out with --teacher-targets"
        for flag in ("--teacher-device-map", "--teacher-dtype")
    ]
    options = parse_command_line([*stored, *"--distill-alpha 0.1 --distill-divergence reverse".split()])
    assert options.distillation.is_on and options.distillation.teacher_targets == "DIR"
