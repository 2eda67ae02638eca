"""Hand the tokens of each step from rank 0 to every rank, in the background and ahead of the step.

Per optimizer step one broadcast of one int32 tensor over a gloo group of its own: a header, then the step's
tokens, or the reader's error message, or the word that the feed ends. Each rank keeps QUEUE_DEPTH steps.
For document attention a token that begins a document travels as its complement, which is negative.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from argonne.data.position import DataPosition
from argonne.data.source import DataProgress, TokenSource
from argonne.errors import DataError, PeerError, RunError, one_line

QUEUE_DEPTH = 2
FEED_TIMEOUT = timedelta(days=30)
"""For the feed's group: ranks wait in the broadcast through the longest save; a dead peer ends it at once."""
CLOSE_SECONDS = 10.0
POLL_SECONDS = 0.2

TOKENS, ERROR, END, MARKED_TOKENS = 0, 1, 2, 3
HASH_INTS = 4
HEADER_INTS = 2 + HASH_INTS + 2
"""Kind, then bytes of the words or 1 where the samples have sources, then the stream hash, then the number of
the step's first sample (int64)."""
MESSAGE_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The sequences of one optimizer step, the same on every rank."""

    tokens: torch.Tensor
    """(samples_per_step, block_size + 1) int32 on the CPU, pinned where asked for."""
    stream_hash: str
    progress: DataProgress | None
    """Where the stream stands after this step (rank 0 only)."""
    wait_seconds: float
    """Time the caller waited for this batch."""
    sources: torch.Tensor | None = None
    """Of a mixture: (samples_per_step,) int64 on the CPU, the number of each sample's source."""
    document_ids: torch.Tensor | None = None
    """(samples_per_step, block_size) int32: equal where two input tokens of a sample share a document; None
    without document attention."""
    first_sample: int = 0
    """Samples of the stream before this step, since step 0."""

    @property
    def position(self) -> DataPosition | None:
        return self.progress.position if self.progress is not None else None

    def micro_batch(
        self, micro_step: int, *, batch_size: int, dp_rank: int, dp_size: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets), each (batch_size, block_size) int64 on ``device``, of one data-parallel rank."""
        start = (micro_step * dp_size + dp_rank) * batch_size
        samples = self.tokens[start : start + batch_size].to(device, non_blocking=True).long()
        return samples[:, :-1].contiguous(), samples[:, 1:].contiguous()

    def micro_sources(
        self, micro_step: int, *, batch_size: int, dp_rank: int, dp_size: int, device: torch.device | str
    ) -> torch.Tensor | None:
        """The ``sources`` of the same samples, (batch_size,) int64 on ``device``."""
        if self.sources is None:
            return None
        start = (micro_step * dp_size + dp_rank) * batch_size
        return self.sources[start : start + batch_size].to(device, non_blocking=True)

    def micro_documents(
        self, micro_step: int, *, batch_size: int, dp_rank: int, dp_size: int, device: torch.device | str
    ) -> torch.Tensor | None:
        """The ``document_ids`` of the same samples, (batch_size, block_size) int32 on ``device``."""
        if self.document_ids is None:
            return None
        start = (micro_step * dp_size + dp_rank) * batch_size
        return self.document_ids[start : start + batch_size].to(device, non_blocking=True)


class _StepTokens(NamedTuple):
    """One step on a rank."""

    tokens: torch.Tensor
    sources: torch.Tensor | None
    document_ids: torch.Tensor | None
    stream_hash: str
    progress: DataProgress | None
    first_sample: int


class StepFeed:
    """Every rank's end of the hand-out. Rank 0 passes the ``source``, which the feed then owns; others None.

    ``group`` is a gloo group of all ranks that nothing else uses, made with FEED_TIMEOUT; None in a world
    of one rank. Source rank is global rank 0.
    """

    def __init__(
        self,
        source: TokenSource | None,
        *,
        samples_per_step: int,
        block_size: int,
        group: dist.ProcessGroup | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._source = source
        self._shape = (samples_per_step, block_size + 1)
        self._group = group
        self._pin_memory = pin_memory
        self._queue: queue.Queue[_StepTokens | RunError] = queue.Queue(QUEUE_DEPTH)
        self._stop = threading.Event()
        self._begun = threading.Event()
        self._failure: RunError | None = None
        self._device = torch.cuda.current_device() if pin_memory else None
        self._thread = threading.Thread(target=self._run, name="data-feed", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the first step's tokens, or the reader's error, are here."""
        while not self._begun.wait(POLL_SECONDS) and self._thread.is_alive():
            pass

    def next(self) -> StepBatch:
        """The next step's tokens; DataError (the reader's, on every rank) or PeerError if none can come."""
        start = time.monotonic()
        if self._failure is not None:
            raise self._failure
        item = self._get()
        if isinstance(item, RunError):
            self._failure = item
            raise item
        return StepBatch(**item._asdict(), wait_seconds=time.monotonic() - start)

    def _get(self) -> _StepTokens | RunError:
        while True:
            alive = self._thread.is_alive()  # asked first: what a thread put before it ended is still there
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not alive:
                    return PeerError("the data feed has ended: rank 0 closed it before this rank")

    def close(self) -> None:
        """End the hand-out on this rank; rank 0 tells the others, whose threads end too. Never hangs."""
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self._source is not None:
            self._source.close()
            self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> StepFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, item: _StepTokens | RunError) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=POLL_SECONDS)
                self._begun.set()
                return
            except queue.Full:
                continue

    def _message(self) -> torch.Tensor:
        size = HEADER_INTS + max(self._shape[0] * (self._shape[1] + 1), MESSAGE_BYTES // 4)
        return torch.zeros(size, dtype=torch.int32)

    def _broadcast(self, message: torch.Tensor) -> None:
        if self._group is None:
            return
        try:
            dist.broadcast(message, src=0, group=self._group)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise PeerError(f"another rank is gone (the hand-out of tokens failed: {reason})") from error

    def _step_of(self, message: torch.Tensor, stream_hash: str, progress: DataProgress | None) -> _StepTokens:
        samples, length = self._shape
        content = message[HEADER_INTS : HEADER_INTS + samples * (length + 1)]
        tokens = content[: samples * length].view(self._shape)
        documents = None
        if message[0] == MARKED_TOKENS:
            begins = tokens < 0
            documents = begins[:, :-1].cumsum(1, dtype=torch.int32)
            tokens = torch.where(begins, ~tokens, tokens)
        if self._pin_memory:
            tokens, documents = tokens.pin_memory(), None if documents is None else documents.pin_memory()
        sources = content[samples * length :].long() if message[1] else None
        if sources is not None and self._pin_memory:
            sources = sources.pin_memory()
        first_sample = int(message[2 + HASH_INTS : HEADER_INTS].view(torch.int64))
        return _StepTokens(tokens, sources, documents, stream_hash, progress, first_sample)

    def _run(self) -> None:
        if self._device is not None:  # a new thread begins on GPU 0, where pinning would open a context
            torch.cuda.set_device(self._device)
        if self._source is None:
            self._receive_steps()
        else:
            self._send_steps()

    # rank 0's thread

    def _send_steps(self) -> None:
        try:
            while not self._stop.is_set():
                self._send_step()
            self._send_word(END, "")
        except PeerError as error:
            self._put(error)

    def _send_step(self) -> None:
        assert self._source is not None
        try:
            step = self._source.next_step()
        except DataError as error:
            self._fail(error)
            return
        except Exception as error:  # noqa: BLE001
            # The thread boundary: the tokenizers library raises bare Exception, a tokenizer that brings its
            # own code (--trust-remote-code) anything, and if this thread died of it, the other ranks would
            # wait in their broadcast for ever.
            failure = DataError(f"the data reader failed: {type(error).__name__}: {one_line(error)}")
            failure.__cause__ = error
            self._fail(failure)
            return
        message = self._message()
        message[0] = TOKENS if step.starts is None else MARKED_TOKENS
        message[2 : 2 + HASH_INTS] = torch.from_numpy(
            np.frombuffer(bytes.fromhex(step.progress.stream_hash), "<i4").copy()
        )
        message[2 + HASH_INTS : HEADER_INTS].view(torch.int64).fill_(step.progress.samples - self._shape[0])
        content = message[HEADER_INTS:]
        tokens = step.tokens
        if step.starts is not None:
            tokens = tokens.copy()
            tokens[:, :-1][step.starts] ^= -1
        content[: tokens.size] = torch.from_numpy(tokens).flatten()
        if step.sources is not None:
            message[1] = 1
            content[tokens.size : tokens.size + len(step.sources)] = torch.from_numpy(step.sources)
        self._broadcast(message)
        self._put(self._step_of(message, step.progress.stream_hash, step.progress))

    def _fail(self, error: DataError) -> None:
        if self._stop.is_set():  # closing: the source was taken away
            return
        self._send_word(ERROR, str(error))
        self._put(error)
        self._stop.wait()
        self._group = None  # the others' threads ended with the message

    def _send_word(self, kind: int, text: str) -> None:
        message = self._message()
        encoded = text.encode()[:MESSAGE_BYTES]
        message[0], message[1] = kind, len(encoded)
        message.numpy()[HEADER_INTS:].view(np.uint8)[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        self._broadcast(message)

    # every other rank's thread

    def _receive_steps(self) -> None:
        try:
            while True:
                message = self._message()
                self._broadcast(message)
                kind, size = int(message[0]), int(message[1])
                if kind in (TOKENS, MARKED_TOKENS):
                    digest = message.numpy()[2 : 2 + HASH_INTS].astype("<i4").tobytes().hex()
                    self._put(self._step_of(message, digest, None))
                    continue
                if kind == ERROR:
                    text = message.numpy()[HEADER_INTS:].tobytes()[:size].decode(errors="ignore")
                    self._put(DataError(text))
                return
        except PeerError as error:
            self._put(error)
