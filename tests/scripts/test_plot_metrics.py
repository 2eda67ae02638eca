"""scripts/plot_metrics.py: the terminal's line, its marks, the picture, and mistakes in one line."""

import json
from pathlib import Path

import pytest
from plot_metrics import main, smoothed, sparkline


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder: ten steps whose loss falls from 10 to 1, and one that was not finite."""
    lines: list[dict[str, float | None]] = [{"step": step, "loss": 11.0 - step} for step in range(1, 11)]
    lines.insert(4, {"step": 5, "loss": None})
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "training_metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def test_a_line_of_blocks() -> None:
    assert sparkline([1.0, 2.0, 3.0], blocks="abc") == "abc"
    assert sparkline([1.0] * 4 + [3.0] * 4, width=2, blocks="abc") == "ac"
    assert sparkline([5.0, 5.0], blocks="abc") == "aa"
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])  # unbiased from the first step


def test_the_loss_is_drawn_and_marked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([str(run), "--mark", "6=resumed", "--mark", "99=beyond the end"]) == 0
    line, mark, drawn = capsys.readouterr().out.splitlines()
    assert line.startswith("loss 10.00 ") and mark.strip() == "^ step 6: resumed"
    assert mark.index("^") == len("loss 10.00 ") + 5
    picture = run / "stats" / "loss.png"
    assert drawn == f"drawn in {picture}" and picture.read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text("no metrics\n")
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, code, told in (
        ([str(tmp_path / "nowhere")], 1, "nowhere: No such file"),
        ([str(tmp_path / "text.jsonl")], 1, "is not a file of metrics"),
        ([str(tmp_path / "empty.jsonl")], 1, "holds no step yet"),
        ([str(run), "--mark", "six"], 2, "--mark six: give STEP=TEXT"),
        ([str(run), "--output", "/proc/no/loss.png"], 1, "/proc/no/loss.png cannot be written"),
    ):
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    with pytest.raises(SystemExit):
        main([str(run), "--output", "loss.doc"])
    assert "error: --output loss.doc: give a name that ends in .png or .svg" in capsys.readouterr().err
