"""The hand-out of tokens over gloo ranks: same tokens everywhere, errors everywhere, a clean end."""

import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from data_feed import FEED_TIMEOUT, StepBatch, StepFeed
from data_source import DataProgress, SourceStep, chain_hash
from data_stream import DataPosition
from run_errors import DataError, PeerError, RunError

G, B = 4, 8


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
            position=DataPosition(row=self.step, block_size=B), stream_hash=f"{self.step:032x}"
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
    feed = make_feed(rank, CountingSource())
    hashes = []
    for step in range(7):
        batch = feed.next()
        assert np.array_equal(batch.tokens.numpy(), expected_tokens(step))
        assert (batch.position is None) == (rank != 0)
        assert (
            rank != 0 or batch.position.row == step + 1
        )  # the last batch handed over, not the last prefetched
        hashes.append(batch.stream_hash)
    feed.close()
    assert not feed._thread.is_alive()
    return hashes


def test_every_rank_gets_the_same_steps() -> None:
    results = run_ranks(hand_out, 2)
    assert results[0] == results[1] == [f"{step + 1:032x}" for step in range(7)]


def fail_in_the_middle(rank: int, world_size: int, kind: str) -> list[str]:
    error = DataError("cannot read a.parquet: cut") if kind == "data" else ZeroDivisionError("oh\nno")
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


@pytest.mark.parametrize(
    ("kind", "message"),
    [("data", "cannot read a.parquet: cut"), ("bug", "the data reader failed: ZeroDivisionError: oh no")],
)
def test_a_reader_error_reaches_every_rank(kind: str, message: str) -> None:
    assert run_ranks(fail_in_the_middle, 2, kind) == [[message] * 2] * 2


def close_in_the_middle(rank: int, world_size: int) -> float:
    feed = make_feed(rank, CountingSource())
    feed.next()
    time.sleep(0.5)  # let every queue fill, so that threads stand in put and broadcast
    dist.barrier()
    start = time.monotonic()
    feed.close()
    assert not feed._thread.is_alive()
    return time.monotonic() - start


def test_close_in_the_middle_is_quick() -> None:
    assert max(run_ranks(close_in_the_middle, 3)) < 5


def lose_a_peer(rank: int, world_size: int) -> str:
    feed = make_feed(rank, CountingSource())
    feed.next()
    if rank == 0:
        # a death that gloo sees: the feed's sockets close without a word
        os.kill(os.getpid(), 9)
    try:
        while True:
            feed.next()
    except PeerError as error:
        return str(error)


def test_a_dead_rank_zero_is_an_error_on_the_others() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\]"):  # rank 1 did report: only rank 0 is missing
        run_ranks(lose_a_peer, 2, timeout=10)


def test_one_rank_needs_no_group() -> None:
    source = CountingSource(fails_at=5, error=DataError("end"))
    with StepFeed(source, samples_per_step=G, block_size=B) as feed:
        for step in range(5):
            assert np.array_equal(feed.next().tokens.numpy(), expected_tokens(step))
        with pytest.raises(RunError, match="^end$"):
            feed.next()
    assert source.closed


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
