"""scripts/prepare_data.py --tokenize: the stream is that of tokenizing on the fly, also after a kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from inspect_data import main as inspect
from prepare_data import main as prepare

import argonne.data.stream as stream
import argonne.testing.corpus as corpus
from argonne.data.tokenizer import load_tokenizer
from argonne.files import synchronize
from data_stream import open_stream
from tests import ROOT
from tests.data.shard_samples import options_for

TEXTS = ["a <|endoftext|> b", None, "", *corpus.short_texts(120, 500), "end"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of three text shards, tokenizer folder)."""
    folder = tmp_path_factory.mktemp("inputs")
    corpus.write_shards(folder / "text", TEXTS, shards=12)  # 000_00010 comes after 000_00002
    return folder / "text", corpus.build_tokenizer(folder / "tokenizer")


def arguments(inputs: Any, output: Path, kind: str, *more: str) -> list[str]:
    return [
        str(inputs[0]), "--tokenize", str(inputs[1]), "--token-format", kind, "--output-dir", str(output),
        "--shard-mib", "0.01", "--row-group-mib", "0.002", "--num-proc", "2", *more,
    ]  # fmt: skip


def as_source(output: Path, kind: str) -> dict[str, Any]:
    column = None if kind == "bin" else "input_ids"
    return {"data_glob": f"{output}/*.{kind}", "token_column": column}


@pytest.mark.parametrize("kind", ["parquet", "bin"])
def test_the_stream_is_that_of_the_text(kind: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Token for token through two epochs; with a list column the documents too."""
    assert prepare(arguments(inputs, tmp_path / "out", kind)) == 0
    assert not (tmp_path / ".out.tokenizing").exists()
    assert len(list((tmp_path / "out").iterdir())) > 2
    tokenizer = load_tokenizer(str(inputs[1]))
    marks = {"block_size": 64, "document_attention": True}
    text = open_stream(options_for(inputs[0], **marks), tokenizer)
    tokens = open_stream(options_for(tmp_path, **marks, **as_source(tmp_path / "out", kind)), tokenizer)
    epoch = 0
    while epoch < 2:
        step, same = text.source.next_step(), tokens.source.next_step()
        assert (step.tokens == same.tokens).all()
        assert step.progress.stream_hash == same.progress.stream_hash
        if kind == "parquet":
            assert (step.starts[:, 1:] == same.starts[:, 1:]).all()  # type: ignore[index]
        epoch = step.progress.position.epoch
    text.source.close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["parquet", "bin"])
def test_a_killed_run_goes_on(kind: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed by -9 once a shard is vouched for; the same command then gives the same files."""
    assert prepare(arguments(inputs, tmp_path / "whole", kind)) == 0
    command = arguments(inputs, tmp_path / "out", kind)
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *command])
    journal, deadline = tmp_path / ".out.tokenizing" / "journal.json", time.monotonic() + 120
    while not journal.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "out").exists():  # else it was quicker than the kill
        (tmp_path / ".out.tokenizing" / ("000_00001." + kind)).touch()
        assert prepare(command) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["parquet", "bin"])
def test_what_is_vouched_for_is_not_done_again(
    kind: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(arguments(inputs, tmp_path / "whole", kind)) == 0
    finished: list[Path] = []

    def stop(path: Path) -> None:
        synchronize(path)
        finished.append(path)
        if sum(name.suffix == f".{kind}" for name in finished) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("argonne.tools.token_writer.synchronize", stop)
    assert prepare(arguments(inputs, tmp_path / "out", kind)) == 130
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.tokenizing").glob(f"*.{kind}")}
    batches: list[int] = []
    plain = stream.text_batches

    def counted(documents: Any) -> Any:
        for texts, last, marks in plain(documents):
            batches.append(len(marks))
            yield texts, last, marks

    monkeypatch.setattr(stream, "text_batches", counted)
    assert prepare(arguments(inputs, tmp_path / "out", kind)) == 0
    assert 0 < sum(batches) < len([text for text in TEXTS if text])
    kept = [
        path for path, time_ in before.items() if (tmp_path / "out" / path.name).stat().st_mtime_ns == time_
    ]
    assert len(kept) == 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_settings_begin_anew(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    partial = tmp_path / ".out.tokenizing"
    partial.mkdir()
    (partial / "journal.json").write_text('{"settings": "other", "shards": 1}')
    (partial / "000_00000.bin").write_bytes(b"old")
    assert prepare(arguments(inputs, tmp_path / "out", "parquet")) == 0
    assert not list((tmp_path / "out").glob("*.bin"))


def test_raw_files_are_tokenized_too(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """As if they were made text shards first."""
    texts = [text for text in TEXTS if text]
    for number, text in enumerate(texts):
        (tmp_path / "raw" / f"{number}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number}.txt").write_text(text, newline="\n")
    raw = (tmp_path / "raw", inputs[1])
    assert prepare([str(raw[0]), "--output-dir", str(tmp_path / "text")]) == 0
    assert prepare(arguments(raw, tmp_path / "direct", "parquet")) == 0
    assert prepare(arguments((tmp_path / "text", inputs[1]), tmp_path / "twice", "parquet")) == 0
    rows = [
        [
            row
            for path in sorted((tmp_path / name).glob("*.parquet"))
            for row in pq.read_table(path)["input_ids"].to_pylist()
        ]
        for name in ("direct", "twice")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == len(texts)


def test_mistakes_are_one_line(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(arguments(inputs, tmp_path / "out", "bin", "--num-proc", "0")) == 2
    assert prepare(arguments(inputs, tmp_path / "out", "bin", "--text-field", "x")) == 1
    assert prepare(arguments((inputs[0], tmp_path / "none"), tmp_path / "out", "bin")) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "no column 'x'" in errors[1] and "no tokenizer at" in errors[2]


@pytest.mark.parametrize("kind", ["parquet", "bin"])
def test_inspect_data_decodes_tokens(
    kind: str, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(arguments(inputs, tmp_path / "out", kind)) == 0
    capsys.readouterr()
    common = ["--data-glob", f"{tmp_path}/out/*.{kind}", "--tokenizer-path", str(inputs[1])]
    common += [] if kind == "bin" else ["--token-column", "input_ids"]
    assert inspect(common) == 0
    shown = capsys.readouterr().out
    assert "tokens" in shown and "a <|endoftext|> b" in shown
    place = "000_00000.bin:0:0" if kind == "bin" else "000_00000.parquet:0"
    assert inspect([*common, "--at", place, "--block-size", "32", "--batch-size", "1"]) == 0
    assert "a <|endoftext|> b<|endoftext|>" in capsys.readouterr().out
