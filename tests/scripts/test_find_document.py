"""scripts/find_document.py: the steps that saw a document, against a count of tokens."""

import shutil
from pathlib import Path

import find_document
import pytest
from transformers import AutoTokenizer

from argonne.files import OutputFolder
from tests.scripts.conftest import INTERVAL, LAST_STEP, FinishedRun
from tests.scripts.test_branch_run import contents

TOKENS_A_STEP = 128


def spans(run: FinishedRun) -> list[range]:
    """The tokens of each document in the stream."""
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    found, begin = [], 0
    for text in run.texts:
        end = begin + len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        found.append(range(begin, end))
        begin = end
    return found


def steps_of(span: range) -> list[int]:
    """The steps of which the document has an input or a target."""
    return [
        step
        for step in range(1, LAST_STEP + 1)
        if span.start <= step * TOKENS_A_STEP and span.stop > (step - 1) * TOKENS_A_STEP
    ]


def test_every_document_is_found_in_the_steps_that_its_tokens_say(
    finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished_run.folder)
    names = [f"000_00000.parquet:{row}" for row in range(8)]
    assert find_document.main([str(finished_run.folder), "--document", *names]) == 0
    said = capsys.readouterr().out
    for name, span in zip(names, spans(finished_run), strict=False):
        steps = steps_of(span)
        line = next(line for line in said.splitlines() if line.startswith(f"{name}:"))
        if not steps:
            assert "no step saw it" in line
            continue
        shown = ", ".join(find_document.ranges(steps))
        assert line == f"{name}: seen in steps {shown}"
        kept = [str(one) for one in range(INTERVAL, LAST_STEP + 1, INTERVAL) if one >= steps[0]]
        assert f"kept checkpoints that saw it: {', '.join(kept)}" in said
    assert contents(finished_run.folder) == before


def test_a_text_and_a_shard(finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_document.main([str(finished_run.folder), "--text", finished_run.texts[2]]) == 0
    assert capsys.readouterr().out.startswith("000_00000.parquet:2: seen in steps ")
    assert find_document.main([str(finished_run.folder), "--shard", "000_00002.parquet"]) == 0
    assert "000_00002.parquet: no step saw it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--document", "000_00000.parquet:20"], "000_00000.parquet:20 is no document"),
        (["--document", "000_00000.parquet"], "--document 000_00000.parquet: give SHARD:ROW"),
        (["--shard", "other.parquet"], "other.parquet is no shard of"),
        (["--text", "no such words in here"], "no document of the run's data holds the text"),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_document.main([str(finished_run.folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_records_with_a_gap(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run.folder, run)
    path = OutputFolder(run).metrics
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    assert find_document.main([str(run), "--document", "000_00000.parquet:2"]) == 1
    assert "has no line of step 3" in capsys.readouterr().err
