"""The hand-out of tokens over gloo ranks: same tokens everywhere, errors everywhere, a clean end."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from argonne.data.feed import FEED_TIMEOUT, QUEUE_DEPTH, StepBatch, StepFeed
from argonne.data.position import DataPosition
from argonne.data.source import DataProgress, SourceStep, chain_hash
from argonne.errors import DataError, PeerError, RunError
from argonne.testing.distributed import run_ranks
from tests import ROOT

G, B = 4, 8
MANY = 1 << 40
"""Samples before the first step."""


class CountingSource:
    """Token values count on; raises ``error`` at step ``fails_at``."""

    def __init__(self, fails_at: int = -1, error: Exception | None = None) -> None:
        self.step, self.fails_at, self.error, self.closed = 0, fails_at, error, False

    def next_step(self) -> SourceStep:
        if self.step == self.fails_at:
            assert self.error is not None
            raise self.error
        tokens = expected_tokens(self.step)
        self.step += 1
        progress = DataProgress(
            position=DataPosition(row=self.step, block_size=B),
            stream_hash=f"{self.step:032x}",
            samples=MANY + G * self.step,
        )
        return SourceStep(tokens=tokens, progress=progress)

    def close(self) -> None:
        self.closed = True


def expected_tokens(step: int) -> np.ndarray:
    return np.arange(G * (B + 1), dtype=np.int32).reshape(G, B + 1) + 1000 * step


def make_feed(rank: int, source: CountingSource) -> StepFeed:
    group = dist.new_group(backend="gloo", timeout=FEED_TIMEOUT)
    return StepFeed(source if rank == 0 else None, samples_per_step=G, block_size=B, group=group)


def hand_out(rank: int, world_size: int) -> list[str]:
    """Seven steps, then a close while every queue is full; returns the hashes."""
    feed = make_feed(rank, CountingSource())
    hashes = []
    for step in range(7):
        batch = feed.next()
        assert np.array_equal(batch.tokens.numpy(), expected_tokens(step))
        assert batch.first_sample == MANY + G * step
        if rank == 0:  # the place after the last batch handed over, not after the last prefetched
            assert batch.position is not None and batch.position.row == step + 1
        else:
            assert batch.position is None
        hashes.append(batch.stream_hash)
    time.sleep(0.5)  # let every queue fill, so that the threads stand in put and broadcast
    dist.barrier()
    start = time.monotonic()
    feed.close()
    assert time.monotonic() - start < 5 and not feed._thread.is_alive()
    with pytest.raises(RunError):
        while True:
            feed.next()
    return hashes


def fail_in_the_middle(rank: int, world_size: int, error: Exception) -> list[str]:
    feed = make_feed(rank, CountingSource(fails_at=3, error=error))
    for step in range(3):
        assert np.array_equal(feed.next().tokens.numpy(), expected_tokens(step))
    messages = []
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            feed.next()
        messages.append(str(caught.value))
    feed.close()
    assert not feed._thread.is_alive()
    return messages


def hand_out_and_fail(rank: int, world_size: int) -> list[list[str]]:
    return [
        hand_out(rank, world_size),
        fail_in_the_middle(rank, world_size, DataError("cannot read a.parquet: cut")),
        fail_in_the_middle(rank, world_size, ZeroDivisionError("oh\nno")),
    ]


def test_every_rank_gets_the_same_steps_and_errors() -> None:
    results = run_ranks(hand_out_and_fail, 2)
    assert results[0] == results[1]
    hashes, data_messages, bug_messages = results[0]
    assert hashes == [f"{step + 1:032x}" for step in range(7)]
    assert data_messages == ["cannot read a.parquet: cut"] * 2
    assert bug_messages == ["the data reader failed: ZeroDivisionError: oh no"] * 2


def lose_rank_zero(rank: int, folder: str) -> None:
    """Rank 0 dies by -9 after a step; rank 1 writes the error that it gets."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    feed = make_feed(rank, CountingSource())
    feed.next()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            feed.next()
    except PeerError as error:
        Path(folder, "error").write_text(str(error))
    start = time.monotonic()
    feed.close()
    assert time.monotonic() - start < 5
    os._exit(0)  # gloo's own clean-up would wait for the dead rank


def test_a_dead_rank_zero_is_an_error_on_the_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=lose_rank_zero, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [-signal.SIGKILL, 0]
    assert (tmp_path / "error").read_text().startswith("another rank is gone")


def test_one_rank_needs_no_group() -> None:
    source = CountingSource(fails_at=5, error=DataError("end"))
    with StepFeed(source, samples_per_step=G, block_size=B) as feed:
        for step in range(5):
            assert np.array_equal(feed.next().tokens.numpy(), expected_tokens(step))
        with pytest.raises(RunError, match=r"^end$"):
            feed.next()
    assert source.closed


def test_the_feed_runs_ahead_only_so_far() -> None:
    source = CountingSource()
    with StepFeed(source, samples_per_step=G, block_size=B) as feed:
        for taken in (1, 2):
            feed.next()
            time.sleep(0.3)
            assert taken < source.step <= taken + QUEUE_DEPTH + 1  # one more waits to be put


def test_micro_batches_follow_the_arithmetic() -> None:
    tokens = torch.arange(12 * 5, dtype=torch.int32).view(12, 5)
    batch = StepBatch(tokens=tokens, stream_hash="", progress=None, wait_seconds=0.0)
    rows = []
    for micro_step in range(3):
        for dp_rank in range(2):
            inputs, targets = batch.micro_batch(
                micro_step, batch_size=2, dp_rank=dp_rank, dp_size=2, device="cpu"
            )
            assert inputs.dtype == torch.int64 and torch.equal(inputs[:, 1:], targets[:, :-1])
            rows.append(torch.cat([inputs, targets[:, -1:]], dim=1))
    assert torch.equal(torch.cat(rows), tokens.long())


def test_the_hash_does_not_depend_on_the_grouping() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, (12, 9)).astype(np.int32)
    whole = chain_hash("0" * 32, tokens)
    stepwise = "0" * 32
    for start in range(0, 12, 3):
        stepwise = chain_hash(stepwise, tokens[start : start + 3])
    assert whole == stepwise != chain_hash("0" * 32, tokens[::-1])


def test_the_hash_is_the_documented_one() -> None:
    document = (ROOT / "docs" / "data.md").read_text()
    names: dict[str, Any] = {}
    exec(document.split("```python\n")[1].split("```")[0], names)
    tokens = np.random.default_rng(1).integers(0, 2**31 - 1, (5, 7)).astype(np.int32)
    by_hand = "0" * 32
    for sample in tokens.tolist():
        by_hand = names["next_hash"](by_hand, sample)
    assert by_hand == chain_hash("0" * 32, tokens)


def test_waiting_for_the_first_step() -> None:
    """`wait` returns with the first tokens, or with the error that `next` then raises."""

    class SlowSource(CountingSource):
        def next_step(self) -> SourceStep:
            if self.step == 0:
                time.sleep(0.5)
            return super().next_step()

    with StepFeed(SlowSource(), samples_per_step=G, block_size=B) as feed:
        start = time.monotonic()
        feed.wait()
        assert 0.3 < time.monotonic() - start
        assert feed.next().wait_seconds < 0.2
    with StepFeed(CountingSource(0, DataError("end")), samples_per_step=G, block_size=B) as feed:
        feed.wait()
        with pytest.raises(DataError, match="end"):
            feed.next()
