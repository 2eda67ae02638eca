"""Tokenizing workers: threads around the Rust tokenizer, or processes that run this file.

A process encodes the batches that come in on stdin, answers on stdout and ends with its parent. The messages
are length-prefixed pickles between this program and itself. It ignores the signals meant for the trainer; the
end of its stdin, which is also how it notices that the parent is gone, ends it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from argonne.data.tokenizer import Encoder, EncoderRecipe, PlainEncoder, UnencodableError, restored_encoder
from argonne.errors import DataError, one_line

PROCESSES_FROM = 4
"""With this many workers and more, tokenizing moves from threads to processes of its own."""
TRAINER_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
LENGTH = struct.Struct("<q")


def _send(stream: IO[bytes], message: Any) -> None:
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(LENGTH.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """The next message; EOFError where the other side is gone."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        raise EOFError
    (size,) = LENGTH.unpack(header)
    payload = stream.read(size)
    if len(payload) < size:
        raise EOFError
    return pickle.loads(payload)


def _path() -> str:
    """PYTHONPATH under which a child finds this package, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


class EncoderProcess:
    """The parent's end of one tokenizing process; use it from one thread at a time."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        # A child inherits the blocked signals of the thread that starts it, so none can reach it from birth.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "argonne.data.encoder_pool"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ
                | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._recipe: dict[str, Any] | None = recipe

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def encode(self, texts: Sequence[str], last: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, lengths int64); UnencodableError, or DataError where the process failed or died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if self._recipe is not None:
                _send(self._process.stdin, self._recipe)
                self._recipe = None
            _send(self._process.stdin, (texts, last))
            answer = _receive(self._process.stdout)
        except (EOFError, BrokenPipeError, ValueError) as error:  # ValueError: closed by close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            code = self._process.returncode
            raise DataError(f"a tokenizing process ended (exit status {code}): lower --num-proc") from error
        if isinstance(answer, str):
            raise DataError(f"a tokenizing process failed: {answer}")
        ids, lengths = (np.frombuffer(answer[0], dtype=np.int32), np.frombuffer(answer[1], dtype=np.int64))
        if answer[2]:
            raise UnencodableError(ids, lengths, answer[2])
        return ids, lengths

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EncoderPool:
    """Encodes batches in the background: threads around the Rust tokenizer, or processes of their own.

    ``workers`` is the number wanted; it is cut to the CPUs this process may use. From PROCESSES_FROM on
    (or with ``processes=True``) each is a process, so that no Python work of theirs holds up the trainer.
    """

    def __init__(self, recipe: EncoderRecipe, workers: int, processes: bool | None = None) -> None:
        # Each worker encodes whole batches alone: one batch spread over many threads scales badly.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.workers = max(1, min(workers, usable_cpus()) if processes is None else workers)
        self.uses_processes = self.workers >= PROCESSES_FROM if processes is None else processes
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="tokenize")
        self._all: list[EncoderProcess] = []
        self._idle: queue.SimpleQueue[Encoder] = queue.SimpleQueue()
        if self.uses_processes:
            content = recipe.for_process()
            self._all = [EncoderProcess(content) for _ in range(self.workers)]
            for process in self._all:
                self._idle.put(process)
        else:
            encoder = recipe.build()
            if isinstance(encoder, PlainEncoder):  # Python, of which only one thread can run
                self.workers = 1
            for _ in range(self.workers):
                self._idle.put(encoder)

    def submit(self, texts: Sequence[str], last: Sequence[bool]) -> Future[tuple[np.ndarray, np.ndarray]]:
        """Encode a batch; the future's result or error is that of `Encoder.encode`."""
        return self._threads.submit(self._encode, texts, last)

    def _encode(self, texts: Sequence[str], last: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        encoder = self._idle.get()
        try:
            return encoder.encode(texts, last)
        finally:
            self._idle.put(encoder)

    def close(self) -> None:
        """End the workers; batches not yet begun are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.close()
        self._threads.shutdown(wait=True)


def _end_with(parent: int) -> None:
    """A fork of the parent's may keep our stdin open after its death: look for that too."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for number in TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        encoder = restored_encoder(_receive(source))
        while True:
            texts, last = _receive(source)
            try:
                (ids, lengths), reasons = encoder.encode(texts, last), {}
            except UnencodableError as error:
                ids, lengths, reasons = error.ids, error.lengths, error.reasons
            except Exception as error:  # noqa: BLE001
                # The process boundary: the tokenizers library raises bare Exception, and a tokenizer that
                # brings its own code (--trust-remote-code) anything; the trainer makes it a DataError.
                _send(answers, one_line(error))
                continue
            _send(answers, (ids.tobytes(), lengths.tobytes(), reasons))


if __name__ == "__main__":
    main()
