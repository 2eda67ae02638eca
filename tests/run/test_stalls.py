"""Ranks that stall: judged from beats alone, and found, named and ended in pretended runs."""

import signal
import time
from pathlib import Path

import pytest

from argonne.run.stalls import PATIENCE, Beat, Progress, StallJudge, collective_limit
from tests.run.pretended import WORKER, Start, ended, wait_for_step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_stopped_for_ever_is_named(start: Start, tmp_path: Path, victim: int) -> None:
    ranks = start(3, stall_timeout=2.0)
    wait_for_step(tmp_path, 3)
    ranks[victim].send_signal(signal.SIGSTOP)
    outcomes = ended(ranks)
    assert outcomes[victim][0] == -signal.SIGKILL
    errors = "".join(errors for _, errors in outcomes)
    assert (
        errors.count("error: ") == 1 and f"rank {victim} gave no sign of life" in errors and "step" in errors
    )


def test_a_rank_stopped_for_a_while_is_waited_for(start: Start, tmp_path: Path) -> None:
    ranks = start(2, stall_timeout=8.0, steps=60)
    wait_for_step(tmp_path, 3)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(3.0)
    ranks[1].send_signal(signal.SIGCONT)
    assert ended(ranks) == [(0, ""), (0, "")]


def test_a_rank_that_hangs_is_named_with_its_stack(start: Start, tmp_path: Path) -> None:
    ranks = start(3, hang_at=[2, 4], stall_timeout=2.0)
    outcomes = ended(ranks)
    assert [code for code, _ in outcomes] == [1, 1, 1]
    errors = "".join(errors for _, errors in outcomes)
    assert errors.count("error: ") == 1 and "made no progress" in errors and "last seen in step 3" in errors
    assert "after all_reduce (number 4)" in errors
    assert (
        "time.sleep(1000)" in (WORKER.read_text())
        and "in train" in (tmp_path / "stats/stack_rank_2.txt").read_text()
    )


def beat(number: int, work: int, step: int = 5, phase: str = "step") -> Beat:
    return Beat(number=number, step=step, phase=phase, work=work, collective="all_reduce (number 7)")


def test_silence_is_judged_on_the_judges_clock() -> None:
    judge = StallJudge(10.0)
    for at in range(12):
        verdict = judge.observe({0: beat(at, at), 1: beat(0, 0)}, float(at))
    assert verdict is not None and verdict.silent and verdict.ranks == (1,)
    assert "rank 1 gave no sign of life for 10 s (--stall-timeout), last seen in step 5, step" in verdict.text


def test_the_rank_furthest_behind_holds_up_the_rest() -> None:
    judge = StallJudge(10.0)
    for at in range(12):
        verdict = judge.observe({0: beat(at, 8), 1: beat(at, 7), 2: beat(at, 8)}, float(at))
    assert verdict is not None and not verdict.silent and verdict.ranks == (1,)
    assert "made no progress" in verdict.text and "after all_reduce (number 7)" in verdict.text


def test_while_any_rank_moves_no_one_is_stuck() -> None:
    judge = StallJudge(10.0)
    assert all(judge.observe({0: beat(at, at), 1: beat(at, 0)}, float(at)) is None for at in range(40))


def test_a_save_may_take_longer_than_a_step() -> None:
    judge = StallJudge(10.0)
    verdicts = [judge.observe({0: beat(at, 1, phase="save")}, float(at)) for at in range(70)]
    assert verdicts[:60] == [None] * 60 and verdicts[-1] is not None


def test_a_judge_that_was_away_begins_anew() -> None:
    judge = StallJudge(10.0)
    judge.observe({0: beat(1, 1)}, 0.0)
    assert judge.observe({0: beat(1, 1)}, 1000.0) is None


def test_progress_counts_marks_and_collectives() -> None:
    class Counted:
        last = "all_reduce"
        total_calls = 3

    progress = Progress()
    assert (progress.work, progress.collective, progress.phase) == (0, "", "start")
    progress.mark("step", 4)
    progress.collectives = Counted()
    assert (progress.work, progress.collective, progress.step) == (4, "all_reduce (number 3)", 4)


def test_a_save_in_the_background_is_progress_only_where_the_loop_waits_for_it() -> None:
    progress = Progress()
    progress.mark("step", 3)
    before = progress.work
    progress.pulse()
    assert progress.work == before  # a loop that hangs is not excused by a save that goes on
    progress.mark("save")
    before = progress.work
    progress.pulse()
    assert progress.work > before


def test_a_collective_outlasts_the_judge() -> None:
    """NCCL's watchdog aborts with its own words: by then our line must have named the rank."""
    longest = max(patience for patience in PATIENCE.values() if patience != float("inf"))
    for timeout in (1.0, 600.0, 7200.0):
        assert collective_limit(timeout, least=600.0) > longest * timeout
    assert collective_limit(0.0, least=600.0) == 600.0
