"""scripts/plot_training.py: the terminal's line, pictures, the page in a browser, mistakes in one line."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from plot_training import main

from argonne.tools.run_history import read_history, smoothed, sparkline

HOSTILE = "<script>document.title='owned'</script> $x_$ & \"quotes\""


def write_run(folder: Path, **more: Any) -> Path:
    """Ten steps whose loss falls from 10 to 1, one of them not finite, with two sources and a resume."""
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": None if step == 5 else 11.0 - step,
            "lr": 1e-3 / step,
            "grad_norm": 1.0 + step,
            "tokens_processed": 100 * step,
            "tokens_per_second": 50.0,
            "step_seconds": 2.0,
            "peak_memory_bytes": 2**30,
            "loss_by_source": {HOSTILE: 11.0 - step, "_math": 12.0 - step},
            "stage": "main" if step < 8 else HOSTILE,
            **more,
        }
        for step in range(1, 11)
    ]
    lines[4]["skipped"] = "non-finite loss or gradient"
    lines[6]["resumed"] = True
    stats = folder / "stats"
    stats.mkdir(parents=True)
    (stats / "training_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [{"step": step, "name": HOSTILE, "loss": 3.0, "bits_per_byte": 1.1} for step in (5, 10)]
    (stats / "eval_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    (stats / "samples.jsonl").write_text(json.dumps({"step": 10, "text": HOSTILE}) + "\n")
    (stats / "run_status.json").write_text(json.dumps({"state": "stopped", "reason": HOSTILE}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_a_line_of_blocks() -> None:
    assert sparkline([1.0, 2.0, 3.0], plain=True) == "_+@"
    assert sparkline([1.0] * 4 + [3.0] * 4, width=2, plain=True) == "_@"
    assert sparkline([5.0, 5.0], plain=True) == "__"
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])  # unbiased from the first step


def test_history_of_a_run(run: Path) -> None:
    history = read_history(run)
    assert [(event.step, event.text) for event in history.events()] == [
        (5, "skipped"),
        (7, "resumed"),
        (8, f"stage {HOSTILE}"),
    ]
    assert history.sources() == [HOSTILE, "_math"] and history.sets() == [HOSTILE]
    assert history.places("tokens")[-1] == 1000 and history.places("time")[-1] == pytest.approx(20 / 3600)


def test_half_a_line_of_a_run_that_is_being_written_is_left_out(run: Path) -> None:
    with (run / "stats" / "training_metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert read_history(run).steps[-1]["step"] == 10


def test_the_loss_is_drawn_and_marked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([str(run), "--mark", "6=resumed", "--mark", "99=beyond the end"]) == 0
    line, mark, picture, page = capsys.readouterr().out.splitlines()
    assert line.startswith("loss 10.00 ") and mark.strip() == "^ step 6: resumed"
    assert mark.index("^") == len("loss 10.00 ") + 4  # of nine finite steps
    assert picture == f"picture: {run}/stats/training.png" and page == f"page: {run}/stats/training.html"
    assert (run / "stats" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_several_runs_over_each_other(run: Path, tmp_path: Path, axis: str) -> None:
    pytest.importorskip("matplotlib")
    other = write_run(tmp_path / "$other_run$", mfu=0.4)
    output = tmp_path / "both.svg"
    assert main([str(run), str(other), "--x", axis, "--output", str(output)]) == 0
    assert "<svg" in output.read_text()


def test_the_page_escapes_every_text(run: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main([str(run), "--output", str(run / "page.html")]) == 0
    page = (run / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_in_a_real_browser(run: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main([str(run), "--output", str(run / "page.html")]) == 0
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-quic",
            f"--user-data-dir={run}/profile", "--dump-dom", f"file://{run}/page.html",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>run</title>" in done.stdout and done.stdout.count("<svg") >= 18
    assert "document.title='owned'" in done.stdout and "<script" not in done.stdout


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text("no metrics\n")
    (tmp_path / "other.jsonl").write_text('{"loss": 1.0}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, code, told in (
        ([str(tmp_path / "nowhere")], 1, "nowhere: No such file"),
        ([str(tmp_path / "text.jsonl")], 1, "is not a file of metrics"),
        ([str(tmp_path / "other.jsonl")], 1, "is not a file of metrics"),
        ([str(tmp_path / "empty.jsonl")], 1, "holds no step yet"),
        ([str(run), "--mark", "six"], 2, "--mark six: give STEP=TEXT"),
        ([str(run), "--output", "/proc/no/loss.png"], 1, "/proc/no/loss.png cannot be written"),
        ([str(run), "--output", "/proc/no/loss.html"], 1, "/proc/no/loss.html cannot be written"),
    ):
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and told in error
    with pytest.raises(SystemExit):
        main([str(run), "--output", "loss.doc"])
    assert "error: --output loss.doc: give a name that ends in .png, .svg, .html" in capsys.readouterr().err
