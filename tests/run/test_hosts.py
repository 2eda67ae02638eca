"""Hosts that go without a word: connections that end, and what is said of their ranks."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from argonne.run import hosts
from argonne.run.hosts import HostWatch, Links
from argonne.run.stalls import Progress
from tests.run.pretended import Start, ended, wait_for, wait_for_step

PLACES = {0: "first", 1: "first", 2: "second", 3: "second"}


@pytest.fixture
def links() -> Iterator[Callable[[], Links]]:
    made: list[Links] = []

    def make() -> Links:
        made.append(Links(20.0))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_the_end_of_a_process_ends_its_connection(links: Callable[[], Links]) -> None:
    first, second, third = links(), links(), links()
    told = first.serve()
    second.connect(0, "127.0.0.1", told, 1)
    third.connect(0, "127.0.0.1", told, 2)
    second.close()
    wait_for(lambda: list(first.lost()) == [1])
    first.close()
    wait_for(lambda: list(third.lost()) == [0])
    assert second.lost() == {}, "its own closing is no loss"


def test_a_stranger_is_not_taken_for_a_rank(links: Callable[[], Links]) -> None:
    first, second = links(), links()
    port, token = first.serve().split()
    for line in (b"GET / HTTP/1.0\r\n", f"{'0' * len(token)} 3\n".encode(), f"{token} x\n".encode()):
        with socket.create_connection(("127.0.0.1", int(port))) as stranger:
            stranger.sendall(line)
            stranger.settimeout(60)
            assert stranger.recv(1) == b""
    second.connect(0, "127.0.0.1", f"{port} {token}", 1)
    second.close()
    wait_for(lambda: list(first.lost()) == [1])


class Board:
    """What the ranks tell each other, in this process."""

    def __init__(self) -> None:
        self.told: dict[tuple[str, int | str], str] = {}

    def read(self, kind: str, rank: int | str) -> str | None:
        return self.told.get((kind, rank))

    def write(self, kind: str, rank: int | str, text: str) -> None:
        self.told[kind, rank] = text


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def join(board: Board, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], HostWatch]]:
    """Ranks on the hosts of PLACES, all in this process; those elsewhere connect when they first look."""
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.3)
    joined: list[HostWatch] = []

    def join_as(rank: int) -> HostWatch:
        monkeypatch.setattr(socket, "gethostname", lambda: PLACES[rank])
        progress = Progress()
        progress.mark("step", 7)
        address = "127.0.0.1"
        joined.append(
            HostWatch(
                rank, progress, address=address, stall_timeout=600.0, read=board.read, write=board.write
            )
        )
        joined[-1].look(PLACES, {})
        return joined[-1]

    yield join_as
    for watch in joined:
        watch.close()


def settled(watch: HostWatch, left: dict[int, str] | None = None, seconds: float = 1.0) -> str | None:
    """What the rank says of a host within a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (verdict := watch.look(PLACES, left or {})) is not None:
            assert verdict.silent
            return verdict.text
        time.sleep(0.02)
    return None


Join = Callable[[int], HostWatch]


def test_a_host_that_is_gone_is_named_with_its_ranks(join: Join) -> None:
    first, third, fourth = join(0), join(2), join(3)
    assert settled(first, seconds=0.5) is None and not first.losing
    third.close()
    fourth.close()
    text = settled(first, seconds=60)
    assert text is not None and text.startswith("host second is gone, with ranks 2, 3, after step 7 (step): ")
    assert first.losing


def test_a_host_of_which_a_rank_lives_speaks_for_itself(join: Join) -> None:
    first, third, _ = join(0), join(2), join(3)
    third.close()
    wait_for(lambda: first.losing)
    assert settled(first) is None


@pytest.mark.parametrize("state", ["failed", "stopped", "finished"])
def test_ranks_that_have_said_how_they_end_are_not_lost(join: Join, state: str) -> None:
    first, third, fourth = join(0), join(2), join(3)
    third.close()
    fourth.close()
    wait_for(lambda: first.losing)
    assert settled(first, {2: state, 3: state}) is None


def test_a_host_whose_ranks_still_beat_has_lost_its_cable_for_a_moment(join: Join, board: Board) -> None:
    first, third, fourth = join(0), join(2), join(3)
    third.close()
    fourth.close()
    wait_for(lambda: first.losing)
    for number in range(60):
        board.write("beat", 3, f"beat {number}")
        assert first.look(PLACES, {}) is None
        time.sleep(0.02)
    assert settled(first, seconds=60) is not None, "and then it is gone"


def test_rank_0s_host_is_watched_from_elsewhere(join: Join) -> None:
    first, third, fourth = join(0), join(2), join(3)
    first.close()
    text = settled(third, seconds=60)
    assert text is not None and text.startswith("host first is gone, with ranks 0, 1, after step 7 (step): ")
    assert settled(fourth) is None, "one rank says it"


def test_without_a_store_each_rank_knows_and_one_says_it(join: Join) -> None:
    first, third, fourth = join(0), join(2), join(3)
    answered = time.monotonic()
    assert third.without_store(answered - 100, answered) is None, "the store alone may be slow"
    first.close()
    wait_for(lambda: third.losing and fourth.losing)
    now = time.monotonic()
    assert third.without_store(now, now + 0.2) is None
    later = now + 1.0
    told = [watch.without_store(now, later) for watch in (third, fourth)]
    assert [speaks for _, speaks in (each for each in told if each is not None)] == [True, False]
    assert told[0] is not None and told[0][0].startswith("rank 0 on host first is gone, and the run's store")
    assert third.without_store(later, later) is None, "it still answers"


def killed(ranks: list[subprocess.Popen[str]], victims: list[int], folder: Path) -> list[tuple[int, str]]:
    wait_for_step(folder, 3)
    for victim in victims:
        ranks[victim].send_signal(signal.SIGKILL)
    return ended(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("victims", "host"), [([2, 3], "second"), ([0, 1], "first")])
def test_a_whole_host_killed_is_named_by_one_rank_of_the_other(
    start: Start, tmp_path: Path, victims: list[int], host: str
) -> None:
    """Long before a stall is judged, and while the others wait for ever."""
    began = time.monotonic()
    ranks = start(4, hosts=list(PLACES.values()), stall_timeout=600.0, steps=10**6)
    outcomes = killed(ranks, victims, tmp_path)
    assert time.monotonic() - began < 100
    left = [outcome for rank, outcome in enumerate(outcomes) if rank not in victims]
    assert [code for code, _ in left] == [1, 1]
    errors = "".join(errors for _, errors in left)
    assert errors.count("error: ") == 1
    assert f"error: host {host} is gone, with ranks {victims[0]}, {victims[1]}, after step" in errors


def test_a_death_on_a_host_where_others_live_is_said_there(start: Start, tmp_path: Path) -> None:
    ranks = start(4, hosts=list(PLACES.values()), stall_timeout=600.0, steps=10**6)
    outcomes = killed(ranks, [3], tmp_path)
    assert [code for code, _ in outcomes] == [1, 1, 1, -signal.SIGKILL]
    errors = "".join(errors for _, errors in outcomes)
    assert errors.count("error: ") == 1 and "error: rank 3 died after step" in outcomes[2][1]
