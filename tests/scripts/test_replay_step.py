"""scripts/replay_step.py: a past step again, bit for bit, and its documents with loss, gradient and place."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import replay_step
import torch
from transformers import AutoTokenizer

from argonne.files import OutputFolder
from argonne.testing.launch import checkpoint
from argonne.tools.replay_page import ranked, write_page
from argonne.tools.replay_result import Figure, MeasuredDocument, Replay
from argonne.tools.step_documents import Piece, StepDocument
from model import ArgonneConfig, ArgonneModel
from tests.scripts.conftest import FinishedRun
from tests.scripts.test_branch_run import contents

BLOCK = 64


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the runs of these tests have: sums run in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(run: FinishedRun, step: int) -> tuple[float, float]:
    """(loss, gradient norm) of the step after a checkpoint, by the unsharded model and plain autograd."""
    saved = torch.load(checkpoint(run.folder, step), weights_only=True)
    settings = {key: value for key, value in saved["model_config"].items() if key != "model_type"}
    model = ArgonneModel(ArgonneConfig(**settings))
    model.load_state_dict(saved["model_state_dict"])
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    ids: list[int] = []
    for text in run.texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    begin = step * 2 * BLOCK
    samples = torch.tensor([ids[begin + s * BLOCK : begin + (s + 1) * BLOCK + 1] for s in range(2)])
    logits = model(input_ids=samples[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
    loss.backward()
    squares = [
        parameter.grad.double().square().sum()
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    return float(loss.detach()), math.sqrt(float(sum(squares)))


def test_a_step_bit_for_bit_with_its_documents(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished_run.folder)
    page = tmp_path / "page.html"
    assert replay_step.main([str(finished_run.folder), "--step", "4", "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert "Result: the same step, bit for bit" in said and "step_3.pth" in said
    assert contents(finished_run.folder) == before
    loss, norm = reference(finished_run, 3)
    replayed = {
        line.split(":")[0]: line.rsplit(" ", 1)[1] for line in said.splitlines() if "replayed" in line
    }
    assert float(replayed["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(replayed["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    first, second = (line for line in said.splitlines() if line.startswith("by loss"))
    places = {line.split(", ")[4]: line for line in (first, second)}
    assert sorted(places) == ["row 1", "row 2"] and "000_00000.parquet" in first
    weights = [int(line.split(" tokens")[0].rsplit(" ", 1)[1]) for line in (first, second)]
    losses = [float(line.split("loss ")[2].split(",")[0]) for line in (first, second)]
    assert sum(weights) == 2 * BLOCK and losses[0] >= losses[1]
    assert sum(w * one for w, one in zip(weights, losses, strict=True)) / 128 == pytest.approx(loss, abs=1e-3)
    assert finished_run.texts[2][:40] in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "10"], "--step 10 was not reached"),
        (["--step", "2"], "keeps no checkpoint before step 2 (--step): kept are 3, 6, 9"),
        (["--step", "0"], "--step 0 was not reached"),
    ],
)
def test_mistakes(
    arguments: list[str],
    said: str,
    finished_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert replay_step.main([str(finished_run.folder), *arguments]) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_a_checkpoint_from_the_initial_weights(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(finished_run.folder),
        "--step",
        "2",
        "--from-start",
        "--output",
        str(tmp_path / "p.html"),
    ]
    assert replay_step.main(arguments) == 0
    assert "the same step, bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_another_record_is_not_the_same_step(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run.folder, run)
    path = OutputFolder(run).metrics
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"loss": 6', '"loss": 7')
    path.write_text("".join(lines))
    assert replay_step.main([str(run), "--step", "4", "--output", str(tmp_path / "p.html")]) == 1
    assert "error: not the same step: loss differ" in capsys.readouterr().err


def test_the_page_escapes_every_text(tmp_path: Path) -> None:
    def found(row: int, loss: float, norm: float) -> MeasuredDocument:
        place = StepDocument(
            source="<i>", epoch=0, shard="<b>.parquet", row=row, token=0, pieces=(Piece(0, 0, 4),)
        )
        return MeasuredDocument(
            document=place, loss=loss, grad_norm=norm, text="</pre><script>alert(1)</script>"
        )

    replay = Replay(
        step=3,
        checkpoint="<a>",
        layout="one",
        figures=(Figure(name="loss", recorded=1.0, replayed=1.0),),
        same_layout=True,
        documents=(found(1, 1.0, 3.0), found(2, 2.0, 1.0), found(3, math.nan, 2.0)),
        notes=("<u>",),
    )
    assert [one.document.row for one in ranked(replay, lambda one: one.loss)] == [3, 2, 1]
    write_page(replay, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    for tag in ("<script", "<b>.", "<i>", "<a>", "<u>"):
        assert tag not in text
