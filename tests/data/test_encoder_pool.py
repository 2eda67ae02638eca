"""The pool of tokenizing workers: threads or processes, results in order of asking, errors, its end."""

import io
import os
import pickle
import struct
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from argonne.data import encoder_pool
from argonne.data.encoder_pool import PROCESSES_FROM, EncoderPool, EncoderProcess, usable_cpus
from argonne.data.tokenizer import PlainEncoder, UnencodableError
from argonne.errors import DataError

EOS = 0


def letters(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer of the letters a to z."""
    if any(letter not in "abcdefghijklmnopqrstuvwxyz" for letter in text):
        raise ValueError(f"no id for {text}")
    return {"input_ids": [ord(letter) - ord("a") + 1 for letter in text]}


class Lengths:
    """An encoder that gives each text's length, and notes how many threads are in it at once."""

    def __init__(self, together: int = 1) -> None:
        self.barrier = threading.Barrier(together)

    def encode(self, texts: Sequence[str], last: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        self.barrier.wait(30)
        ids = np.array([len(text) for text in texts], dtype=np.int32)
        return ids, np.ones(len(texts), dtype=np.int64)


class Recipe:
    """Gives this encoder here, and a note of it to a process."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def build(self) -> Any:
        return self.encoder

    def for_process(self) -> dict[str, Any]:
        return {"eos": EOS}


def pool_of(encoder: Any, workers: int, processes: bool | None = None) -> EncoderPool:
    return EncoderPool(Recipe(encoder), workers, processes)  # type: ignore[arg-type]


def test_batches_are_encoded_with_an_eos_after_each_document() -> None:
    pool = pool_of(PlainEncoder(letters, EOS), 1)
    answers = [pool.submit(["ab", "c"], [True, False]), pool.submit(["d"], [True])]
    (ids, lengths), (more, _) = [answer.result(30) for answer in answers]
    assert (ids.tolist(), lengths.tolist(), more.tolist()) == ([1, 2, 0, 3], [3, 1], [4, 0])
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    pool.close()


def test_texts_without_ids_are_the_batchs_own_error() -> None:
    pool = pool_of(PlainEncoder(letters, EOS), 1)
    bad, good = pool.submit(["a", "!", "b"], [True, True, True]), pool.submit(["c"], [True])
    with pytest.raises(UnencodableError) as caught:
        bad.result(30)
    assert (caught.value.ids.tolist(), caught.value.lengths.tolist()) == ([1, 0, 2, 0], [2, 0, 2])
    assert caught.value.reasons == {1: "no id for !"}
    assert good.result(30)[0].tolist() == [3, 0]  # the worker goes on
    pool.close()


def test_threads_encode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_pool, "usable_cpus", lambda: 8)
    pool = pool_of(Lengths(together=3), 3)
    assert (pool.workers, pool.uses_processes) == (3, False)
    answers = [pool.submit(["a" * length], [True]) for length in (1, 2, 3)]
    assert [answer.result(30)[0].tolist() for answer in answers] == [[1], [2], [3]]
    pool.close()


def test_a_tokenizer_in_python_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_pool, "usable_cpus", lambda: 8)
    pool = pool_of(PlainEncoder(letters, EOS), 3)
    assert pool.workers == 1
    pool.close()


@pytest.mark.parametrize(
    ("asked", "cpus", "workers", "processes"),
    [
        (1, 8, 1, False),
        (PROCESSES_FROM - 1, 8, PROCESSES_FROM - 1, False),
        (PROCESSES_FROM, 8, PROCESSES_FROM, True),
        (8, 2, 2, False),
        (0, 8, 1, False),
    ],
)
def test_workers_are_cut_to_the_cpus_and_many_are_processes(
    asked: int, cpus: int, workers: int, processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Process(Lengths):
        def __init__(self, recipe: dict[str, Any]) -> None:
            super().__init__()
            self.recipe, self.closed = recipe, False
            started.append(self)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(encoder_pool, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(encoder_pool, "EncoderProcess", Process)
    pool = pool_of(Lengths(), asked)
    assert (pool.workers, pool.uses_processes) == (workers, processes)
    assert [process.recipe for process in started] == [{"eos": EOS}] * (workers if processes else 0)
    assert pool.submit(["abc"], [True]).result(30)[0].tolist() == [3]
    pool.close()
    assert all(process.closed for process in started)


def test_a_closed_pool_drops_what_it_has_not_begun() -> None:
    class Held(Lengths):
        def encode(self, texts: Sequence[str], last: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
            begun.set()
            assert release.wait(30)
            return super().encode(texts, last)

    begun, release = threading.Event(), threading.Event()
    pool = pool_of(Held(), 1)
    first, second = pool.submit(["a"], [True]), pool.submit(["b"], [True])
    assert begun.wait(30)
    closing = threading.Thread(target=pool.close)
    closing.start()
    with pytest.raises(CancelledError):
        second.result(30)
    release.set()
    closing.join(30)
    assert first.result(30)[0].tolist() == [1] and not closing.is_alive()


class Answering:
    """A child process that has written ``answers`` already and ends with ``code``."""

    def __init__(self, answers: bytes, code: int = 3) -> None:
        self.stdin, self.stdout = io.BytesIO(), io.BytesIO(answers)
        self.returncode, self.pid, self.events = code, 4242, list[str]()

    def wait(self, timeout: float | None = None) -> int:
        self.events.append("waited")
        return self.returncode

    def kill(self) -> None:
        self.events.append("killed")


def answered(monkeypatch: pytest.MonkeyPatch, *messages: Any, cut: int = 0) -> tuple[Any, Answering]:
    """The parent's end of a process that has answered so, but for the last ``cut`` bytes."""
    written = b"".join(struct.pack("<q", len(text)) + text for text in map(pickle.dumps, messages))
    child = Answering(written[: len(written) - cut] if cut < len(written) else b"")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: child)
    return EncoderProcess({"eos": EOS}), child


IDS, LENGTHS = np.array([5, 6, 0], dtype=np.int32), np.array([3], dtype=np.int64)


def test_a_process_is_told_its_recipe_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: tuple[Any, ...] = (IDS.tobytes(), LENGTHS.tobytes(), {})
    process, child = answered(monkeypatch, answer, answer)
    for _ in range(2):
        ids, lengths = process.encode(["ef"], [True])
        assert (ids.tolist(), lengths.tolist()) == ([5, 6, 0], [3])
    child.stdin.seek(0)
    said = []
    while header := child.stdin.read(8):
        said.append(pickle.loads(child.stdin.read(*struct.unpack("<q", header))))
    assert said == [{"eos": EOS}, (["ef"], [True]), (["ef"], [True])]
    assert process.pid == 4242
    process.close()
    assert child.events == ["killed", "waited"]


def test_what_a_process_answers_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = answered(
        monkeypatch, "the tokenizer fell over", (IDS.tobytes(), LENGTHS.tobytes(), {1: "no id"})
    )
    with pytest.raises(DataError, match=r"^a tokenizing process failed: the tokenizer fell over$"):
        process.encode(["a"], [True])
    with pytest.raises(UnencodableError) as caught:
        process.encode(["ef", "!"], [True, True])
    assert caught.value.reasons == {1: "no id"} and caught.value.ids.tolist() == [5, 6, 0]


@pytest.mark.parametrize("cut", [1, 60, 10_000])
def test_a_process_that_dies_names_the_flag(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answer: tuple[Any, ...] = (IDS.tobytes(), LENGTHS.tobytes(), {})
    process, _ = answered(monkeypatch, answer, cut=cut)
    with pytest.raises(DataError, match=r"process ended \(exit status 3\): lower --num-proc"):
        process.encode(["ef"], [True])


def test_the_cpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    assert usable_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1
