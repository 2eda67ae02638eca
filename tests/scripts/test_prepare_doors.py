"""What scripts/prepare_data.py must not delete or lose: outputs, links, line ends, arrays, overlaps."""

import json
import os
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prepare_data import main as prepare

from argonne.data.shards import open_corpus


def texts(folder: Path) -> list[str]:
    shards = open_corpus(str(folder), "text")
    return [text for shard in shards for text in pq.read_table(shard.path)["text"].to_pylist()]


def run(*arguments: str | Path) -> int:
    return prepare([str(argument) for argument in arguments])


def test_overwrite_deletes_only_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one")
    out = tmp_path / "out"
    for name in ("out.partial", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    assert run(tmp_path / "a.txt", "--output-dir", out) == 0
    (tmp_path / "a.txt").write_text("two")
    assert run(tmp_path / "a.txt", "--output-dir", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(tmp_path / "a.txt", "--output-dir", out, "--overwrite") == 0 and texts(out) == ["two"]
    for name in ("out.partial", "out.old"):
        assert (tmp_path / name / "mine").read_text() == "mine"
    (out / "notes.md").write_text("mine")
    assert run(tmp_path / "a.txt", "--output-dir", out, "--overwrite") == 2
    assert "notes.md" in capsys.readouterr().err and texts(out) == ["two"]
    (out / "notes.md").unlink()
    shard = out / "000_00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # the user's now
    assert run(tmp_path / "a.txt", "--output-dir", out, "--overwrite") == 2 and shard.exists()


def test_a_folder_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("precious")
    (tmp_path / "link").symlink_to(".")
    for out in (tmp_path, tmp_path / "link"):
        assert run(tmp_path / "a.txt", "--output-dir", out, "--overwrite") == 2
    assert (tmp_path / "a.txt").read_text() == "precious"


def test_links_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to("big")
    for more in ([], ["--overwrite"]):
        assert run(tmp_path / "a.txt", "--output-dir", tmp_path / "out", *more) == 0
        assert (tmp_path / "out").is_symlink() and texts(tmp_path / "big") == ["one"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("../a.txt", "--output-dir", ".") == 0
    assert sorted(os.listdir()) == ["000_00000.parquet", "prepare_data.json"]


def test_an_output_within_the_inputs_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    for more in ([], ["--overwrite"]):
        assert run(tmp_path, "--output-dir", tmp_path / "out", *more) == 0
        assert texts(tmp_path / "out") == ["one"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_taken_off(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("größe\n".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes('{"text":"eins"}\n{"text":"zwei"}\n'.encode(encoding))
    assert run(tmp_path / "a.txt", tmp_path / "b.jsonl", "--output-dir", tmp_path / "out") == 0
    assert texts(tmp_path / "out") == ["größe\n", "eins", "zwei"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_separates(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(end.join([b'{"text":"one\\r\\n"}', b'\xef\xbb\xbf{"text":"two"}']))
    (tmp_path / "b.txt").write_bytes(end.join([b"three", b"four"]))
    for unit, expected in [("file", ["three\nfour"]), ("line", ["three", "four"])]:
        out = tmp_path / unit
        assert run(tmp_path / "a.jsonl", tmp_path / "b.txt", "--output-dir", out, "--document", unit) == 0
        assert texts(out) == ["one\r\n", "two", *expected]


def test_arrays_and_deep_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"text": f"text {index} " * 50} for index in range(3000)]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(records, indent=indent))
        assert run(tmp_path / "a.json", "--output-dir", tmp_path / f"out{indent}") == 0
        assert texts(tmp_path / f"out{indent}") == [record["text"] for record in records]
    (tmp_path / "cut.json").write_text(json.dumps(records)[:-20])
    assert run(tmp_path / "cut.json", "--output-dir", tmp_path / "cut", "--skip-bad-lines") == 1
    assert "element 3000" in capsys.readouterr().err
    deep = '{"text":"a","x":' + "[" * 100_000 + "]" * 100_000 + '}\n{"text":"b"}\n'
    (tmp_path / "d.jsonl").write_text(deep)
    assert run(tmp_path / "d.jsonl", "--output-dir", tmp_path / "deep") == 1
    assert "line 1: nested too deeply" in capsys.readouterr().err
    assert run(tmp_path / "d.jsonl", "--output-dir", tmp_path / "deep", "--skip-bad-lines") == 0
    assert texts(tmp_path / "deep") == ["b"]


def test_overlapping_linked_and_hidden_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw/.git").mkdir(parents=True)
    (tmp_path / "disk/part").mkdir(parents=True)
    (tmp_path / "raw/.git/x").write_bytes(b"\0")
    (tmp_path / "raw/._a.txt").write_bytes(b"\0")
    (tmp_path / "raw/a.txt").write_text("one")
    (tmp_path / "disk/part/b.txt").write_text("two")
    (tmp_path / "raw/part").symlink_to("../disk/part")
    (tmp_path / "raw/loop").symlink_to(".")
    raw = tmp_path / "raw"
    assert run(raw, raw / "a.txt", tmp_path / "disk", "--output-dir", tmp_path / "out") == 0
    assert texts(tmp_path / "out") == ["one", "two"]


@pytest.mark.parametrize("name", ["it's", "[D] x", "a*b", "~x", "-x", "$HOME"])
def test_the_printed_command_is_valid(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one")
    assert run("a.txt", f"--output-dir={name}") == 0
    flag, pattern = shlex.split(capsys.readouterr().out.splitlines()[1])[-2:]
    assert flag == "--data-glob" and not pattern.startswith("-")
    assert len(open_corpus(pattern, "text")) == 1
