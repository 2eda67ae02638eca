"""scripts/compare_runs.py: the first figure that differs, between metrics files, runs and checkouts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_runs import main
from safetensors.torch import save_file

from argonne.tools.run_differences import METRICS, first_difference, first_tensor_difference
from tests import ROOT

STEPS: list[dict[str, Any]] = [
    {"step": step, "loss": 6.0 - 0.1 * step, "grad_norm": 3.0 / step, "lr": 1e-3 * step}
    | {"tokens_processed": 512 * step, "stream_hash": f"{step:032x}", "step_seconds": 0.1}
    for step in range(1, 6)
]


def run_folder(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / METRICS
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def changed(step: int, **values: Any) -> list[dict[str, Any]]:
    return [record | (values if record["step"] == step else {}) for record in STEPS]


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_folder(tmp_path / "a", STEPS)
    second = run_folder(tmp_path / "b", [record | {"step_seconds": 9.9, "mfu": 0.4} for record in STEPS])
    assert main([str(first), str(second / METRICS)]) == 0
    said = capsys.readouterr().out
    assert (
        "compared: stream_hash, tokens_processed, lr, loss, grad_norm" in said and "equal in 5 steps" in said
    )


def test_the_first_figure_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = STEPS[2]["loss"]
    other = changed(3, loss=float(torch.tensor(loss, dtype=torch.float64).nextafter(torch.tensor(9.0))))
    first, second = run_folder(tmp_path / "a", STEPS), run_folder(tmp_path / "b", other)
    assert main([str(first), str(second)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the runs differ: step 3, loss: {loss!r} (") and error.count("\n") == 1
    assert main([str(first), str(second), "--tolerance", "1e-9"]) == 0


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (changed(2, stream_hash="f" * 32, loss=1.0), "step 2, stream_hash"),  # the cause before its effect
        (changed(4, tokens_processed=2049), "step 4, tokens_processed: 2048 in"),
        (
            changed(1, grad_norm=None),
            "step 1, grad_norm: 3.0 (0x1.8000000000000p+1) in the first run, abs",
        ),
        (STEPS[:3], "the first run has 5 steps, the second 3"),
        (STEPS[1:], "step 1 in the first run stands beside step 2"),
    ],
)
def test_differences(records: list[dict[str, Any]], said: str) -> None:
    found = first_difference(STEPS, records)
    assert found is not None and said in found


def test_exports_are_compared_by_their_bytes(tmp_path: Path) -> None:
    """Files as safetensors itself writes them; -0.0 equals 0.0 as a number, not as bytes."""
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    save_file({"a": weights["a"]}, tmp_path / "two" / "model-1.safetensors")
    save_file({"b": weights["b"]}, tmp_path / "two" / "model-2.safetensors")
    save_file({"a": weights["a"], "b": -weights["b"]}, tmp_path / "three" / "model.safetensors")
    assert first_tensor_difference(tmp_path / "one", tmp_path / "two") is None
    found = first_tensor_difference(tmp_path / "one", tmp_path / "three")
    assert found is not None and found.startswith("tensor b: BF16 [4]")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent", "absent"], "absent does not exist"),
        ([".", "."], "is neither a checkout nor a run"),
        ([str(ROOT), "run"], "one is a checkout and the other a run"),
        (["run", "run", "--tolerance", "-1"], "--tolerance -1"),
        ([str(ROOT), str(ROOT), "--work-dir", "run"], "--work-dir run exists"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_folder(tmp_path / "run", STEPS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_file_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("step 1\n")
    assert main([str(path), str(path)]) == 1
    assert "not JSON lines" in capsys.readouterr().err


@pytest.mark.slow
def test_two_checkouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This checkout against a copy of it with another default: found at the first case, in its first step."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "tests", "pretrained", "stats", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    loop = copy / "argonne" / "config" / "options.py"
    before = loop.read_text()
    loop.write_text(before.replace("weight_decay: float = flag(0.1", "weight_decay: float = flag(0.2"))
    assert loop.read_text() != before
    assert main([str(ROOT), str(copy), "--work-dir", str(tmp_path / "work")]) == 1
    assert "the runs differ: tp 1: step 2, loss" in capsys.readouterr().err
