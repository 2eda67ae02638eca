"""Exactly the plain call's ids, whichever way they are made; tokenizing processes that mind their parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import argonne.data.tokenizer as data_tokenize
import argonne.testing.corpus as corpus
from argonne.data.encoder_pool import EncoderPool, EncoderProcess
from argonne.data.tokenizer import (
    EncoderRecipe,
    FastEncoder,
    PlainEncoder,
    join_ids,
    load_tokenizer,
    text_pieces,
    tokenizer_fingerprint,
)
from argonne.errors import DataError
from argonne.tools.bpe_trainer import EOS
from tests import ROOT

TEXTS = [
    "plain words",
    "",
    " ",
    "\n\n\t tabs and\r\nnewlines \u00a0",
    "e\u0301 e\u0301 \ufb01ne \u212b 你好 \U0001f600\u200d\U0001f468",
    f"a special {EOS} inside{EOS}",
    "x" * 5000,
    "0123456789" * 50,
    *corpus.short_texts(5, 3000),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.build_tokenizer(tmp_path_factory.mktemp("tokenizer") / "plain")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def expected_ids(tokenizer: Any, last: list[bool]) -> list[int]:
    ids = []
    for text, ends in zip(TEXTS, last, strict=True):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ends
    return ids


def variant(folder: Path, tmp_path: Path, kind: str) -> Any:
    """A tokenizer whose file asks for what a plain call without special tokens does not do."""
    content = json.loads((folder / "tokenizer.json").read_text())
    if kind == "truncating":
        content["truncation"] = {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        content["padding"] = {
            "strategy": {"Fixed": 32},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": EOS,
        }
    if kind == "templated":
        token = {"SpecialToken": {"id": EOS, "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {EOS: {"id": EOS, "ids": [0], "tokens": [EOS]}},
        }
    other = tmp_path / kind
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(other))
    if kind == "splitting":
        tokenizer.split_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("kind", ["plain", "truncating", "templated", "splitting"])
def test_exactly_the_ids_of_the_plain_call(folder: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = variant(folder, tmp_path, kind)
    last = [index % 3 != 0 for index in range(len(TEXTS))]
    expected = expected_ids(tokenizer, last)
    recipe = EncoderRecipe(tokenizer=tokenizer)
    assert isinstance(recipe.build(), FastEncoder)
    for processes in (False, True):
        pool = EncoderPool(recipe, 1, processes=processes)
        ids, lengths = pool.submit(TEXTS, last).result()
        pool.close()
        assert ids.dtype == np.int32 and ids.tolist() == expected
        starts = np.cumsum(lengths) - lengths
        again = [recipe.build().encode([text], [ends])[0] for text, ends in zip(TEXTS, last, strict=True)]
        assert lengths.tolist() == [len(ids) for ids in again] and starts[-1] == len(expected) - len(
            again[-1]
        )


def test_a_tokenizer_with_python_around_it_is_called(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    plain = type(tokenizer).__call__

    class Shouting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **kwargs: Any) -> Any:
            return plain(self, text.upper(), **kwargs)

    tokenizer.__class__ = Shouting
    last = [True] * len(TEXTS)
    encoder = EncoderRecipe(tokenizer=tokenizer).build()
    assert isinstance(encoder, PlainEncoder)
    assert encoder.encode(TEXTS, last)[0].tolist() == expected_ids(tokenizer, last)


def test_a_slow_tokenizer_works(tmp_path: Path) -> None:
    from transformers import CTRLTokenizer

    vocabulary = {
        "<unk>": 0,
        "l": 1,
        "o": 2,
        "w": 3,
        "lo</w>": 4,
        "low</w>": 5,
        "</s>": 6,
        "lo": 7,
        "w</w>": 8,
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), eos_token="</s>")
    assert not slow.is_fast
    encoder = EncoderRecipe(tokenizer=slow).build()
    ids, lengths = encoder.encode(["low low", "lo"], [True, True])
    expected = [
        [*slow(text, add_special_tokens=False)["input_ids"], slow.eos_token_id] for text in ("low low", "lo")
    ]
    assert ids.tolist() == expected[0] + expected[1] and lengths.tolist() == [len(row) for row in expected]
    assert len(tokenizer_fingerprint(slow)) == 32


def test_what_cannot_be_loaded_is_one_line(folder: Path, tmp_path: Path) -> None:
    broken, no_eos = tmp_path / "broken", tmp_path / "no_eos"
    for other in (broken, no_eos):
        other.mkdir()
        for path in folder.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (no_eos / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "nowhere", "no tokenizer at"),
        (tmp_path / "empty", "tokenizer"),
        (broken, "cannot load the tokenizer"),
        (no_eos, "has no EOS token"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value) and "--tokenizer-path" in str(caught.value)


def test_the_fingerprint_is_the_tokenizers(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    assert tokenizer_fingerprint(load_tokenizer(str(folder))) == tokenizer_fingerprint(tokenizer)
    padded = load_tokenizer(str(folder))
    padded(
        ["a", "b c"], padding=True, truncation=True, max_length=8
    )  # what calls leave behind is not identity
    assert tokenizer_fingerprint(padded) == tokenizer_fingerprint(tokenizer)
    smaller = load_tokenizer(str(corpus.build_tokenizer(tmp_path / "smaller", vocab_size=500)))
    assert tokenizer_fingerprint(smaller) != tokenizer_fingerprint(tokenizer)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder.parent / "lower").mkdir()
    for path in folder.iterdir():
        (folder.parent / "lower" / path.name).write_bytes(path.read_bytes())
    (folder.parent / "lower" / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_fingerprint(load_tokenizer(str(folder.parent / "lower"))) != tokenizer_fingerprint(
        tokenizer
    )


def test_ids_in_a_row_with_their_lengths() -> None:
    lists = [[5, 0, 2**31 - 1], [], [7], [], [1, 2]]
    last = [True, True, False, False, True]
    ids, lengths = join_ids(lists, last, 9)
    assert ids.dtype == np.int32 and ids.tolist() == [5, 0, 2**31 - 1, 9, 9, 7, 1, 2, 9]
    assert lengths.dtype == np.int64 and lengths.tolist() == [4, 1, 1, 0, 3]
    ids, lengths = join_ids([], [], 9)
    assert ids.tolist() == lengths.tolist() == []


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(text_pieces("a" * (1 << 20))) == [("a" * (1 << 20), True)]
    text = "b" * (1 << 20) + "a\n" + "c" * (1 << 20)
    assert [(len(piece), ends) for piece, ends in text_pieces(text)] == [
        (1 << 20, False),
        (2, False),
        (1 << 20, True),
    ]
    monkeypatch.setattr(data_tokenize, "PIECE_CHARACTERS", 4)
    assert list(text_pieces("ab\nc\nd")) == [("ab\n", False), ("c\nd", True)]
    assert list(text_pieces("abc\nd")) == [("abc\n", False), ("d", True)]
    assert list(text_pieces("abcdefghi")) == [("abcd", False), ("efgh", False), ("i", True)]


def test_a_process_ignores_the_trainers_signals_and_its_death_is_an_error(tokenizer: Any) -> None:
    process = EncoderProcess(EncoderRecipe(tokenizer=tokenizer).for_process())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(process.pid, number)  # from birth on
    ids, _ = process.encode(["some text"], [True])
    assert ids.tolist() == tokenizer("some text")["input_ids"] + [tokenizer.eos_token_id]
    os.kill(process.pid, signal.SIGTERM)
    process.encode(["some text"], [True])
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a tokenizing process ended .*--num-proc"):
        for _ in range(100):
            process.encode(["some text"], [True])
    process.close()


PARENT = """
import sys, time
sys.path.insert(0, {root!r})
from argonne.data.tokenizer import EncoderRecipe, load_tokenizer
from argonne.data.encoder_pool import EncoderPool
pool = EncoderPool(EncoderRecipe(tokenizer=load_tokenizer({folder!r})), 2, processes=True)
pool.submit(["text"], [True]).result()
print(*[process.pid for process in pool._all], flush=True)
time.sleep(60)
"""


def test_processes_end_with_their_parent(folder: Path) -> None:
    root = str(ROOT)
    script = PARENT.format(root=root, folder=str(folder))
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and all(running(pid) for pid in children)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in children)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
