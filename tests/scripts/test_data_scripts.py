"""scripts/prepare_data.py and scripts/inspect_data.py, by their main functions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tqdm
from inspect_data import build_parser
from inspect_data import main as inspect
from prepare_data import main as prepare

import argonne.testing.corpus as corpus
from argonne.config.options import DataOptions, TrainingOptions
from argonne.data.shards import open_corpus
from argonne.data.tokenizer import load_tokenizer
from argonne.testing.sources import source_options
from data_stream import open_stream
from model import ArgonneConfig, ArgonneModel
from tests import ROOT

SCRIPTS = ROOT / "scripts"


def written(folder: Path) -> list[str]:
    assert [
        path.name for path in sorted(folder.parent.glob(folder.name + ".*"))
    ] == []  # nothing half-made beside it
    return [
        text
        for shard in open_corpus(str(folder), "text")
        for text in pq.read_table(shard.path)["text"].to_pylist()
    ]


def test_text_files_become_checked_shards(tmp_path: Path) -> None:
    texts = corpus.short_texts(40, 3000)
    (tmp_path / "in").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "in" / f"part{index}.txt").write_bytes(text.encode())
    (tmp_path / "in" / "part40.txt").write_text("")
    out = tmp_path / "out"
    arguments = [
        str(tmp_path / "in"),
        "--output-dir",
        str(out),
        "--shard-mib",
        "0.03",
        "--row-group-mib",
        "0.01",
    ]
    assert prepare(arguments) == 0
    assert written(out) == [text.replace("\r\n", "\n") for text in texts]  # part2 before part10
    shards = open_corpus(str(out), "text")
    assert len(shards) == 3 and shards[0].name == "000_00000.parquet" and len(shards[0].group_rows) > 1
    assert flipped_bits_noticed(Path(shards[0].path)) > 30


def flipped_bits_noticed(path: Path) -> int:
    """Flip single bits all over the file's pages: each is an error or, in a header's idle field, harmless."""
    whole, texts = path.read_bytes(), pq.read_table(path)["text"].to_pylist()
    noticed = 0
    for place in range(4, len(whole) * 9 // 10, len(whole) // 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert pq.read_table(path, page_checksum_verification=True)["text"].to_pylist() == texts
        except OSError:
            noticed += 1
    return noticed


@pytest.mark.parametrize("codec", [None, "zstd", "gzip", "bz2"])
def test_json_lines(tmp_path: Path, codec: str | None) -> None:
    texts = [*corpus.short_texts(10, 300), "ü\ud800\u2028 line"]
    lines = "".join(json.dumps({"id": 1, "content": text}) + "\n" for text in [*texts, "", None]).encode()
    suffix = {None: "", "zstd": ".zst", "gzip": ".gz", "bz2": ".bz2"}[codec]
    path = tmp_path / f"a.jsonl{suffix}"
    with pa.output_stream(str(path), compression=codec) as file:
        file.write(lines)
    assert prepare([str(path), "--output-dir", str(tmp_path / "out"), "--text-field", "content"]) == 0
    assert written(tmp_path / "out") == [*texts[:-1], "ü\ufffd\u2028 line"]


def test_lines_and_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\r\nfour")
    for unit, expected in [
        ("line", ["one", "two", "three", "four"]),
        ("paragraph", ["one\ntwo\n", "three\nfour"]),
        ("file", ["one\ntwo\n\n\nthree\nfour"]),
    ]:
        arguments = [
            str(tmp_path / "a.txt"),
            "--output-dir",
            str(tmp_path / "out"),
            "--document",
            unit,
            "--overwrite",
        ]
        assert prepare(arguments) == 0
        assert written(tmp_path / "out") == expected


def test_a_datasets_folder(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"body": [f"row {i}" for i in range(7)], "n": list(range(7))})
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "saved")
    arguments = [str(tmp_path / "saved"), "--output-dir", str(tmp_path / "out"), "--text-field"]
    assert prepare([*arguments, "body", "--split", "test"]) == 0
    assert written(tmp_path / "out") == [f"row {i}" for i in range(7)]


def test_bytes_that_are_not_utf8_are_replaced_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes("one\ncaf\xe9\nschön\n".encode().replace(b"\xc3\xa9", b"\xe9"))
    arguments = [str(tmp_path / "a.txt"), "--output-dir", str(tmp_path / "out"), "--document", "line"]
    assert prepare(arguments) == 0
    assert written(tmp_path / "out") == ["one", "caf\ufffd", "schön"]
    assert "not UTF-8, replaced by U+FFFD: 1" in capsys.readouterr().out


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_the_bar_moves_within_a_file(
    tmp_path: Path, codec: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, moved = np.random.default_rng(0), []
    lines = "".join(json.dumps({"text": rng.bytes(3000).hex()}) + "\n" for _ in range(2000))
    path = tmp_path / ("a.jsonl.zst" if codec else "a.jsonl")
    with pa.output_stream(str(path), compression=codec) as file:
        file.write(lines.encode())

    class Bar(tqdm.tqdm):
        def update(self, n: float = 1) -> None:
            self.n += n
            moved.append(self.n)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    assert prepare([str(path), "--output-dir", str(tmp_path / "out")]) == 0
    assert moved == sorted(moved) and moved[-1] == path.stat().st_size
    assert any(0.3 < place / moved[-1] < 0.7 for place in moved)


def test_an_interrupt_leaves_nothing_half_done(tmp_path: Path) -> None:
    import signal
    import time

    lines = json.dumps({"text": "some words " * 300}) + "\n"
    (tmp_path / "a.jsonl").write_text(lines * 60_000)
    script = str(SCRIPTS / "prepare_data.py")
    process = subprocess.Popen(
        [sys.executable, script, str(tmp_path / "a.jsonl"), "--output-dir", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("out.partial-*/*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "error: interrupted: nothing was written; run it again"
    assert not list(tmp_path.glob("out*"))


def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "pretty.json").write_text('{\n "text": "a"\n}')
    (tmp_path / "b.jsonl").write_text('{"body": "a"}')
    (tmp_path / "x.txt").write_bytes(b"ELF\0\1\2")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": [1, 2]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "cut.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfdnonsense")
    for arguments, message in [
        (
            [str(tmp_path / "a.jsonl"), "--output-dir", str(tmp_path / "out")],
            "a.jsonl, line 2: 'text' is int",
        ),
        ([str(tmp_path / "pretty.json"), "--output-dir", str(tmp_path / "out")], "one JSON object a line"),
        ([str(tmp_path / "b.jsonl"), "--output-dir", str(tmp_path / "out")], "takes one of body"),
        ([str(tmp_path / "x.parquet"), "--output-dir", str(tmp_path / "out")], "train on it as it is"),
        ([str(tmp_path / "x.txt"), "--output-dir", str(tmp_path / "out")], "x.txt is not a text file"),
        ([str(tmp_path / "saved"), "--output-dir", str(tmp_path / "out")], "'text' is int64, not text"),
        ([str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "out")], "no file or folder"),
        ([str(tmp_path / "a.jsonl"), "--output-dir", str(tmp_path / "full")], "did not write (file)"),
        ([str(tmp_path / "cut.jsonl.zst"), "--output-dir", str(tmp_path / "out")], "cut.jsonl.zst"),
        ([str(tmp_path / "full"), "--output-dir", str(tmp_path / "out")], "hold no text"),
    ]:
        assert prepare(arguments) in (1, 2)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert not list(tmp_path.glob("out*"))
    assert (
        prepare([str(tmp_path / "a.jsonl"), "--output-dir", str(tmp_path / "out"), "--skip-bad-lines"]) == 0
    )
    assert written(tmp_path / "out") == ["fine"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    data_glob, tokenizer, _ = corpus.small_corpus(tmp_path_factory.mktemp("small"))
    return data_glob, str(tokenizer)


def test_the_corpus_at_a_glance(small: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(["--data-glob", small[0], "--tokenizer-path", small[1]]) == 0
    shown = capsys.readouterr().out
    assert "000_00002.parquet" in shown and "3 shards, 60 rows, about 60 documents" in shown
    assert inspect(["--data-glob", small[0]]) == 0
    assert "give --tokenizer-path" in capsys.readouterr().out


def test_the_text_of_a_step_and_of_a_position(
    small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    options = source_options(small[0], block_size=20, samples_per_step=3, num_proc=1)
    tokenizer = load_tokenizer(small[1])
    source = open_stream(options, tokenizer)
    steps = [source.source.next_step() for _ in range(6)]
    source.source.close()
    texts = [tokenizer.decode(sample[:-1]) for sample in steps[5].tokens]
    common = ["--data-glob", small[0], "--tokenizer-path", small[1], "--block-size", "20", "--num-proc", "1"]
    assert inspect([*common, "--global-batch-size", "3", "--step", "5"]) == 0
    by_step = capsys.readouterr().out
    position = steps[4].progress.position
    place = f"{position.file_name}:{position.row}:{position.token_offset}"
    assert inspect([*common, "--batch-size", "3", "--at", place]) == 0
    by_position = capsys.readouterr().out
    shape: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    weights = ArgonneModel(ArgonneConfig(vocab_size=16, intermediate_size=8, **shape)).state_dict()
    saved = {
        "data_position": source.position_dict(steps[2].progress),
        "data_state": source.state_dict(steps[2].progress),
    }
    torch.save({**saved, "global_step": 3, "model_state_dict": weights}, tmp_path / "ck.pth")
    assert inspect([*common, "--checkpoint-path", str(tmp_path / "ck.pth"), "--step", "5"]) == 0
    by_checkpoint = capsys.readouterr().out
    lines = [
        json.dumps({"step": index + 1} | step.progress.metrics()) + "\n" for index, step in enumerate(steps)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert (
        inspect([*common, "--batch-size", "3", "--metrics", str(tmp_path / "metrics.jsonl"), "--step", "5"])
        == 0
    )
    by_metrics = capsys.readouterr().out
    for shown in (by_step, by_position, by_checkpoint, by_metrics):
        assert [part.split("---\n", 1)[1].rstrip("\n") for part in shown.split("\n--- sample ")[1:]] == [
            text.rstrip("\n") for text in texts
        ]
    assert steps[5].progress.stream_hash in by_step and steps[5].progress.stream_hash in by_checkpoint


def test_the_shuffled_order(
    small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data-glob", small[0], "--tokenizer-path", small[1], "--block-size", "20", "--step", "1"]
    assert inspect([*common, "--no-streaming", "--cache-dir", str(tmp_path), "--seed", "3"]) == 0
    assert "from sample 4 of the shuffled order of epoch 0" in capsys.readouterr().out
    assert inspect([*common, "--no-streaming"]) == 2
    assert "--cache-dir" in capsys.readouterr().err


def test_inspect_mistakes(small: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ck.pth").write_bytes(b"nonsense")
    tokenizer = ["--tokenizer-path", small[1]]
    for arguments, message, code in [
        (["--data-glob", small[0], "--step", "1"], "--tokenizer-path", 2),
        (["--data-glob", str(tmp_path / "*.parquet")], "no shard matches", 1),
        (["--data-glob", small[0], *tokenizer, "--at", "x.parquet"], "FILE:ROW", 2),
        (["--data-glob", small[0], *tokenizer, "--at", "x.parquet:0"], "no shard 'x.parquet', but 000_", 2),
        (["--data-glob", small[0], *tokenizer, "--at", "000_00001.parquet:20"], "has 20 (from 0)", 2),
        (["--data-glob", small[0], *tokenizer, "--at", "000_00001.parquet:2", "--no-streaming"], "--step", 2),
        (["--data-glob", small[0], *tokenizer, "--step", "0", "--samples", "-1"], "--samples -1 must", 2),
        (["--data-glob", small[0], *tokenizer, "--step", "0", "--characters", "-1"], "--characters -1", 2),
        (["--data-glob", small[0], *tokenizer, "--global-batch-size", "0"], "--global-batch-size 0", 2),
        (["--data-glob", small[0], *tokenizer, "--checkpoint-path", str(tmp_path / "ck.pth")], "ck.pth", 1),
        (["--data-glob", small[0], *tokenizer, "--checkpoint-path", str(tmp_path)], str(tmp_path), 1),
    ]:
        assert inspect(arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_scripts_run_from_anywhere(tmp_path: Path) -> None:
    for name in ("prepare_data", "inspect_data"):
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "usage:" in done.stdout


def test_what_is_left_out_is_as_in_a_run() -> None:
    """Otherwise the step that is shown is not the step that was trained on."""
    shown, training, data = build_parser().parse_args([]), TrainingOptions(), DataOptions()
    for name in ("seed", "block_size", "batch_size"):
        assert getattr(shown, name) == getattr(training, name), name
    assert shown.data_glob == data.data_glob and shown.gradient_accumulation_steps == 1
