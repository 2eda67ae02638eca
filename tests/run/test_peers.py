"""What a rank knows of the others: places, notes, deaths, stopped processes, verdicts."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest

from argonne.run.peers import Note, Peers
from argonne.run.processes import process_fields
from argonne.run.stalls import Beat, Progress, Verdict
from tests.run.pretended import wait_for


class DictStore:
    """A store in this process; ``broken`` makes it fail as one does whose process is gone."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.broken = False

    def _there(self) -> None:
        if self.broken:
            raise RuntimeError("Connection reset by peer")

    def set(self, key: str, value: str) -> None:
        self._there()
        self.values[key] = value

    def get(self, key: str) -> bytes:
        self._there()
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        self._there()
        return all(key in self.values for key in keys)


Join = Callable[..., Peers]


@pytest.fixture
def store() -> DictStore:
    return DictStore()


@pytest.fixture
def join(store: DictStore) -> Iterator[Join]:
    """Ranks of one run, all in this process; their threads end with the test."""
    joined: list[Peers] = []

    def join_as(
        rank: int,
        world_size: int = 2,
        *,
        attempt: int = 0,
        stall_timeout: float = 0.0,
        on_verdict: Callable[[Verdict, bool], None] = lambda verdict, speaks: None,
    ) -> Peers:
        peers = Peers(
            store,
            rank,
            world_size,
            Progress(),
            attempt=attempt,
            stall_timeout=stall_timeout,
            on_verdict=on_verdict,
        )
        joined.append(peers)
        return peers

    yield join_as
    for peers in joined:
        peers.close()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """The process of another rank."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def put_place(store: DictStore, rank: int, pid: int, *, host: str = "", started: str = "") -> None:
    """Say where a rank runs, as it would itself."""
    fields = process_fields(pid)
    place = {
        "host": host or socket.gethostname(),
        "pid": pid,
        "started": started or (fields[19] if fields else ""),
    }
    store.set(f"argonne/run/0/place/{rank}", json.dumps(place))


def test_ranks_learn_who_has_joined(join: Join) -> None:
    first = join(0, 3)
    first.refresh()
    assert first.absent() == [1, 2]
    join(2, 3)
    first.refresh()
    assert first.absent() == [1] and first.missing() == first.dead() == []


def test_a_goodbye_is_heard_by_the_others_only(join: Join) -> None:
    first, second = join(0), join(1)
    note = Note(state="failed", text="shard.parquet is unreadable: remove it", final=True, code=130)
    second.say_goodbye(note)
    first.wait_for_notes(60.0)
    second.refresh()
    assert first.notes() == {1: note} and second.notes() == {}


def test_a_stop_and_its_reason_reach_every_rank(join: Join) -> None:
    first, second = join(0), join(1)
    assert first.stop_reason() is None
    second.ask_to_stop("SIGTERM to rank 1")
    assert first.stop_reason() == second.stop_reason() == "SIGTERM to rank 1"


def test_what_an_earlier_attempt_said_does_not_count(join: Join) -> None:
    before = join(1)
    before.say_goodbye(Note(state="failed", text="killed"))
    before.ask_to_stop("SIGTERM")
    restarted = join(0, attempt=1)
    restarted.refresh()
    assert restarted.absent() == [1] and restarted.notes() == {} and restarted.stop_reason() is None


def test_a_process_that_went_without_a_word_is_dead(
    join: Join, store: DictStore, sleeper: subprocess.Popen[bytes]
) -> None:
    put_place(store, 1, sleeper.pid)
    peers = join(0)
    peers.refresh()
    assert peers.missing() == []
    sleeper.kill()
    wait_for(lambda: peers.missing() == [1])  # also as a corpse that nobody has waited for
    assert peers.dead() == [1]
    note = Note(state="stopped", text="SIGTERM before the first step")
    store.set("argonne/run/0/note/1", json.dumps(dataclasses.asdict(note)))
    assert peers.dead() == []  # it has said why, and the newest notes are asked for
    assert peers.missing() == []


def test_a_later_process_of_the_same_pid_is_another(
    join: Join, store: DictStore, sleeper: subprocess.Popen[bytes]
) -> None:
    put_place(store, 1, sleeper.pid, started="1")
    peers = join(0)
    peers.refresh()
    assert peers.dead() == [1]


def test_processes_of_other_hosts_are_not_looked_at(join: Join, store: DictStore) -> None:
    put_place(store, 1, 2**22 - 1, host="elsewhere", started="1")
    peers = join(0)
    peers.refresh()
    assert peers.absent() == peers.missing() == peers.stopped() == []


def test_only_a_stopped_process_is_killed(
    join: Join, store: DictStore, sleeper: subprocess.Popen[bytes]
) -> None:
    put_place(store, 1, sleeper.pid)
    peers = join(0)
    peers.refresh()
    peers.kill([0, 1])
    assert peers.stopped() == [] and sleeper.poll() is None
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_for(lambda: peers.stopped() == [1])
    peers.kill([0])
    assert sleeper.poll() is None
    peers.kill([1])
    assert sleeper.wait() == -signal.SIGKILL


def test_the_lowest_living_rank_of_a_host_speaks(join: Join, store: DictStore) -> None:
    put_place(store, 0, os.getpid(), host="elsewhere")
    put_place(store, 1, os.getpid())
    third = join(2, 3)
    third.refresh()
    assert not third.is_first_left([0])  # rank 1 lives here
    assert third.is_first_left([1])
    assert third.is_first_left([0, 1])


def test_a_store_that_is_gone_holds_nobody_up(join: Join, store: DictStore) -> None:
    peers = join(0)
    peers.refresh()
    answered = peers.answered
    store.broken = True
    peers.refresh()
    peers.say_goodbye(Note(state="failed", text="x"))
    peers.ask_to_stop("SIGTERM")
    assert peers.answered == answered
    store.broken = False
    peers.refresh()
    assert peers.answered > answered


def test_a_verdict_is_spoken_by_one_rank_and_heard_by_all(join: Join, store: DictStore) -> None:
    """Rank 1 has joined and never beats again; rank 0 judges, a later look of rank 2 finds the verdict."""
    heard: list[tuple[Verdict, bool]] = []
    put_place(store, 1, os.getpid())
    beat = Beat(number=1, step=7, phase="step", work=3, collective="all_reduce (number 4)")
    store.set("argonne/run/0/beat/1", json.dumps(dataclasses.asdict(beat)))
    join(0, 3, stall_timeout=2.0, on_verdict=lambda verdict, speaks: heard.append((verdict, speaks)))
    wait_for(lambda: len(heard) == 1)
    join(2, 3, stall_timeout=2.0, on_verdict=lambda verdict, speaks: heard.append((verdict, speaks)))
    wait_for(lambda: len(heard) == 2)
    (first, speaks), (second, repeats) = heard
    assert first == second and (speaks, repeats) == (True, False)
    assert first.ranks == (1,) and first.silent
    assert "rank 1 gave no sign of life for 2 s (--stall-timeout), last seen in step 7, step" in first.text
