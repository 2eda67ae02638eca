"""Ranks that stall: judged from beats alone, and found, named and ended in pretended runs."""

import signal
import time
from pathlib import Path

import pytest

from argonne.run.stalls import PATIENCE, Beat, GroupWork, Progress, StallJudge, Verdict, collective_limit
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


# ---------------------------------------------------------------------------------------------------
# Loops that have issued the whole step: what the devices have completed tells who stalled.


def test_a_device_that_stalls_is_named_where_all_loops_stand_alike(start: Start, tmp_path: Path) -> None:
    """Each loop gives its device a whole step and waits for it; the device of rank 1 stops before the third
    collective of step 4, and those of the others wait in it."""
    ranks = start(3, device_stalls_at=[1, 4, 3], stall_timeout=2.0)
    outcomes = ended(ranks)
    assert [code for code, _ in outcomes] == [1, 1, 1]
    errors = "".join(errors for _, errors in outcomes)
    assert errors.count("error: ") == 1
    assert "error: rank 1 made no progress for 2 s (--stall-timeout) while ranks 0, 2 wait in" in errors
    assert "all_reduce 15 of mesh_tp, last seen in step 3, step: check that process, its GPU" in errors


def test_a_device_that_goes_on_slowly_is_waited_for() -> None:
    """A step takes longer than a stall may, and no loop counts the collectives of compiled code."""
    judge = StallJudge(10.0)
    for at in range(80):
        groups = {"a": work(at // 8, at // 8)} if at > 5 else {}
        beats = {rank: Beat(number=at, step=5, phase="step", work=9, groups=groups) for rank in range(2)}
        assert judge.observe(beats, float(at)) is None


def standing(groups: dict[int, dict[str, GroupWork]]) -> Verdict:
    """The verdict on ranks whose loops stand at one place for ever, and whose devices show ``groups``."""
    judge = StallJudge(10.0)
    for at in range(12):
        beats = {
            rank: Beat(number=at, step=5, phase="step", work=9, groups=shown if at > 5 else {})
            for rank, shown in groups.items()
        }
        if (verdict := judge.observe(beats, float(at))) is not None:
            return verdict
    raise AssertionError("no verdict")


def work(entered: int, completed: int, group: str = "mesh_tp") -> GroupWork:
    return GroupWork(group=group, entered=entered, completed=completed, kind="all_reduce")


def test_who_is_waited_for_and_waits_for_no_one_is_named() -> None:
    """Replicas (0, 1) and (2, 3): rank 3 stands, rank 2 waits for it, and rank 0 for rank 2."""
    verdict = standing(
        {
            0: {"a": work(7, 7), "x": work(3, 2, "mesh_dp")},
            1: {"a": work(8, 7), "y": work(2, 2, "mesh_dp")},
            2: {"b": work(7, 6), "x": work(2, 2, "mesh_dp")},
            3: {"b": work(6, 6), "y": work(2, 2, "mesh_dp")},
        }
    )
    assert verdict.ranks == (3,)
    assert (
        "rank 3 made no progress for 10 s (--stall-timeout) while rank 2 waits in all_reduce 7"
        in verdict.text
    )


def test_a_collective_that_all_have_entered_is_named_itself() -> None:
    verdict = standing({rank: {"a": work(8, 7)} for rank in range(3)})
    assert verdict.ranks == (0, 1, 2)
    assert "in all_reduce 8 of mesh_tp, which all have entered and none has left" in verdict.text


def test_devices_that_tell_nothing_leave_the_judgement_to_the_loops() -> None:
    verdict = standing({rank: {"a": work(7, 7)} for rank in range(2)})
    assert verdict.ranks == (0, 1) and "last seen in step 5, step: check that process and" in verdict.text


def test_beats_go_through_the_store_whole() -> None:
    sent = Beat(number=1, step=2, phase="step", work=3, groups={"a": work(8, 7), "b": work(1, 1, "mesh_dp")})
    assert Beat.read(sent.text()) == sent
