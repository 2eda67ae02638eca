"""Every command of README.md, CONTRIBUTING.md and docs/: its flags and files exist, and (slow) it runs."""

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq
import pytest
from teacher_targets import main as ask_teacher
from torch.distributed.run import get_args_parser

from argonne.config.command_line import build_parser, parse_recipe
from argonne.config.flags import parse_given
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import checkpoint as checkpoint_of
from argonne.testing.launch import environment, launch
from tests import ROOT
from tests.doc_commands import ASKING, RUN_SCRIPTS, TRAINING, all_commands, script_of, without

COMMANDS = all_commands()
PROGRAMS = {"torchrun", "python", ".venv/bin/python", "bash", "pip", "git"}
each = pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: " ".join(value)[-60:])


class Parsed(Exception):
    """A script's own parser took its arguments."""


def test_there_are_commands_and_all_start_a_known_program() -> None:
    assert len(COMMANDS) > 30
    assert {words[0] for _, words in COMMANDS} <= PROGRAMS


@each
def test_flags_and_files_exist(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in words:
        if re.fullmatch(r"(scripts|recipes|tests|docs)/[\w./]+", name):
            assert (ROOT / name).exists(), f"{page}: {name}"
    if words[0] == "torchrun":
        torchrun = get_args_parser().parse_args(words[1:])
        assert torchrun.training_script in (*RUN_SCRIPTS, ASKING)
    if words[0] == "bash":
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(flag in text for flag in words[2:] if flag.startswith("--")), words
    check_flags(words, monkeypatch)


def check_flags(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser that the command meets takes its arguments."""
    script, arguments = script_of(words)
    if script in RUN_SCRIPTS:
        if arguments == ["--help"]:
            return
        parse_recipe(arguments)
    elif script:
        # These hand what they do not know to the run.
        handing = script in ("scripts/branch_run.py", ASKING)
        method = "parse_known_args" if handing else "parse_args"
        real = getattr(argparse.ArgumentParser, method)

        def parse(self: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
            parsed = real(self, *given, **named)
            if method == "parse_known_args":
                monkeypatch.setattr(argparse.ArgumentParser, method, real)
                assert parse_given(build_parser(), parsed[1])[1] == []
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
        with pytest.raises(Parsed):
            importlib.import_module(Path(script).stem).main(arguments)


@pytest.mark.parametrize(
    "line",
    [
        "python resume_pretrain_tensor.py --tokenizer-path any --no-such-flag",
        "python resume_pretrain_tensor.py --tokenizer-path any --cooldown-steps 3",
        "python resume_pretrain_tensor.py --batch-size 2",
        "python scripts/generate.py --no-such-flag",
        "python scripts/export_hf.py",
    ],
)
def test_a_wrong_command_would_be_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        check_flags(line.split(), monkeypatch)
    assert ended.value.code == 2


# ------------------------------------------------------------------ slow: they run

OVERRIDDEN = (
    "--tokenizer-path", "--data-glob", "--data-mix", "--eval-data", "--eval-interval", "--eval-samples",
    "--init-from", "--checkpoint-path", "--model-config", "--block-size", "--batch-size", "--total-steps",
    "--total-tokens", "--warmup-steps", "--output-dir", "--teacher-path",
)  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its tokenizer, a checkpoint after two steps and its export."""
    folder = tmp_path_factory.mktemp("sample")
    small_corpus(folder)
    flags = ["--final-model-dir", str(folder / "EXPORT"), "--checkpoint-interval", "1"]
    finished = launch(1, *small(folder, folder / "run"), *flags)
    assert finished.code == 0, finished.stderr
    return folder


def small(sample: Path, output: Path) -> list[str]:
    """Flags of a run that takes seconds."""
    return [
        "--model-config", "argonne-tiny", "--tokenizer-path", str(sample / "tokenizer"), "--block-size", "32",
        "--data-glob", str(sample / "data" / "*.parquet"), "--batch-size", "2", "--total-steps", "2",
        "--warmup-steps", "0", "--output-dir", str(output),
    ]  # fmt: skip


def run_flags(arguments: Sequence[str], sample: Path, output: Path) -> list[str]:
    """The command's own flags on the small model and the sample's data."""
    glob = str(sample / "data" / "*.parquet")
    given = [*without(arguments, *OVERRIDDEN), *small(sample, output)]
    mix = [word.partition(":")[0] for word in arguments if re.match(r"\w+=[\d.]+:", word)]
    if mix:
        given = [*without(given, "--data-glob"), "--data-mix", *(f"{part}:{glob}" for part in mix)]
    if "--eval-data" in arguments:
        given += ["--eval-data", f"web={glob}", "--eval-interval", "1", "--eval-samples", "3"]
    first = str(checkpoint_of(sample / "run", 2))
    for flag in ("--init-from", "--checkpoint-path"):
        if flag in arguments:
            given += [flag, first]
    if "--teacher-path" in arguments:
        given = [*without(given, "--teacher-path"), "--teacher-path", str(sample / "EXPORT")]
    if "--checkpoint-path" in arguments:
        given = [*without(given, "--total-steps"), "--total-steps", "4"]
    return given


def make_targets(given: Sequence[str], sample: Path) -> str:
    """Targets for the run of these flags, from the exported model; their folder."""
    folder = sample / f"targets_{len(list(sample.glob('targets_*')))}"
    asking = ["--targets", str(folder), "--teacher-path", str(sample / "EXPORT"), "--samples", "200"]
    assert ask_teacher([*asking, *without(given, "--teacher-targets")]) == 0
    return str(folder)


TRAINED = [
    (page, words)
    for page, words in COMMANDS
    if script_of(words)[0] in RUN_SCRIPTS and "--config" not in words and "--help" not in words
]
"""Recipes (--config) are rehearsed, each, by tests/test_recipes.py."""


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), TRAINED, ids=lambda value: " ".join(value)[-60:])
def test_a_run_of_the_docs_runs(page: str, words: list[str], sample: Path, tmp_path: Path) -> None:
    script, arguments = script_of(words)
    python = [sys.executable]
    if any(word.startswith("--plan") for word in arguments):
        given = arguments
    else:
        given = run_flags(arguments, sample, tmp_path / "run")
        if "--teacher-targets" in arguments:
            given = [*without(given, "--teacher-targets"), "--teacher-targets", make_targets(given, sample)]
        if words[0] == "torchrun":
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*python, str(ROOT / script), *given],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, f"{page}: {finished.stdout}{finished.stderr}"
    if script == TRAINING and given is not arguments:
        assert list((tmp_path / "run" / "pretrained").glob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for _, words in COMMANDS if script_of(words)[0] == ASKING])
def test_targets_of_the_docs_are_made(words: list[str], sample: Path, tmp_path: Path) -> None:
    given = run_flags(script_of(words)[1], sample, tmp_path / "run")
    given = [*without(given, "--targets"), "--targets", str(tmp_path / "targets")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [sys.executable, *(torchrun if words[0] == "torchrun" else []), str(ROOT / ASKING), *given],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "mean mass of the rest" in finished.stdout


ELSEWHERE = ("compare_runs", "update_docs", "quickstart", "distillation_demo")
"""Of two checkouts, and what writes into this one: tests of their own run them."""
SCRIPTED = [
    (page, words)
    for page, words in COMMANDS
    if (name := script_of(words)[0])
    and name not in (*RUN_SCRIPTS, ASKING)
    and not any(part in name for part in ELSEWHERE)
]


def shards(sample: Path) -> list[Path]:
    return sorted((sample / "data").iterdir())


def first_words(sample: Path) -> str:
    """Of the first document."""
    return str(pq.read_table(shards(sample)[0]).column("text")[0].as_py())[:20]


def unseen_list(sample: Path, folder: Path) -> str:
    """A list of the corpus' last document."""
    path = folder / "unseen.jsonl"
    last = sorted((sample / "data").iterdir())[-1]
    path.write_text(f"{last.name}:19\n")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), SCRIPTED, ids=lambda value: " ".join(value)[-60:])
def test_a_script_of_the_docs_runs(page: str, words: list[str], sample: Path, tmp_path: Path) -> None:
    script, arguments = script_of(words)
    if "evaluate" in script and (importlib.util.find_spec("lm_eval") is None or "--tasks" in arguments):
        pytest.skip("lm-eval is not installed, or its tasks need a network")
    file = str(checkpoint_of(sample / "run", 2))
    places = {
        "FILE": file, "FILE_OR_PARTS": file, "TOKENIZER": str(sample / "tokenizer"),
        "NEW": str(tmp_path / "new.pth"),
        "EXPORT": str(tmp_path / "export"), "held_out/*.parquet": str(sample / "data" / "*.parquet"),
        "RUN": str(sample / "run"), "9000": "1", "1234": "2", "a sentence of it": first_words(sample),
        "000_00042.parquet": shards(sample)[0].name, "000_00042.parquet:1234": f"{shards(sample)[0].name}:0",
    }  # fmt: skip
    places["LIST"] = unseen_list(sample, tmp_path)
    finished = subprocess.run(
        [sys.executable, str(ROOT / script), *(places.get(word, word) for word in arguments)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, f"{page}: {finished.stdout}{finished.stderr}"
