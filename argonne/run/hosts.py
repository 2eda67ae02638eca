"""Lost hosts, noticed within seconds: connections between rank 0 and the ranks of other hosts.

A process that ends closes its connection at once. A host without power or network acknowledges nothing any
more, which the kernel notices by TCP's keepalive, whatever the processes do. For a process that is stopped or
busy its kernel answers: it is waited for.
"""

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping

from argonne.errors import rank_list
from argonne.run.stalls import Progress, Verdict

KEEPALIVE_SECONDS = 20.0
"""Silence of a host's kernel that ends a connection; ``--stall-timeout`` where that is less."""
GRACE_SECONDS = 5.0
"""Silence of a host's ranks after that: if one lives there, it has spoken by then."""
_CONNECT_SECONDS = 5.0


class Links:
    """Connections of this process to others, by rank; a thread waits for their ends.

    Args:
        limit: seconds without an acknowledgement.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._selector = selectors.DefaultSelector()
        self._door: socket.socket | None = None
        self._token = ""
        self._lost: dict[int, float] = {}
        self._thread: threading.Thread | None = None
        self._closing = False

    def serve(self) -> str:
        """Let others connect; returns what they need for it, the port and a secret."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._door = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        self._token = secrets.token_hex(8)
        self._watch(self._door, None)
        return f"{self._door.getsockname()[1]} {self._token}"

    def connect(self, rank: int, address: str, told: str, own_rank: int) -> None:
        """Connect to ``rank``, which serves at ``address``; OSError where it cannot be reached."""
        port, token = told.split()
        link = socket.create_connection((address, int(port)), timeout=_CONNECT_SECONDS)
        self._keep_alive(link)
        link.sendall(f"{token} {own_rank}\n".encode())
        self._watch(link, rank)

    def lost(self) -> dict[int, float]:
        """Ranks whose connection has ended, and when (monotonic seconds)."""
        return dict(self._lost)

    def close(self) -> None:
        """Close all; what ends from now on is not lost."""
        self._closing = True
        for key in list((self._selector.get_map() or {}).values()):
            with contextlib.suppress(OSError):
                key.fileobj.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def _keep_alive(self, link: socket.socket) -> None:
        count = 5
        every = max(1, round(0.15 * self._limit))
        idle = max(1, round(self._limit - count * every))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", every), ("TCP_KEEPCNT", count),
            ("TCP_USER_TIMEOUT", round(1000 * self._limit)),
        ):  # fmt: skip
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _watch(self, end: socket.socket, rank: int | None) -> None:
        end.setblocking(False)
        self._selector.register(end, selectors.EVENT_READ, rank)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="links", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(timeout=1.0):
                end = key.fileobj
                assert isinstance(end, socket.socket)
                if end is self._door:
                    self._accept()
                else:
                    self._read(end, key.data)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]

    def _accept(self) -> None:
        assert self._door is not None
        with contextlib.suppress(OSError):
            link, _ = self._door.accept()
            self._keep_alive(link)
            self._watch(link, None)

    def _read(self, link: socket.socket, rank: int | None) -> None:
        try:
            text = link.recv(128)
        except BlockingIOError:
            return
        except OSError:  # not acknowledged, reset
            text = b""
        if rank is None and text:  # who it is; a line this short comes in one piece
            token, _, number = text.decode(errors="replace").strip().partition(" ")
            if secrets.compare_digest(token.encode(), self._token.encode()) and number.isdecimal():
                self._selector.modify(link, selectors.EVENT_READ, int(number))
                return
            text = b""
        if not text:
            self._selector.unregister(link)
            link.close()
            if rank is not None and not self._closing:
                self._lost[rank] = time.monotonic()


class HostWatch:
    """Which hosts are gone: rank 0 watches the others, and their ranks watch rank 0's.

    Args:
        address: where rank 0's host is reached; "": nothing is connected.
        stall_timeout: seconds; 0: stalls are not judged (a host that is gone is no stall).
        read, write: of the store's keys, by kind and rank.
    """

    def __init__(
        self,
        rank: int,
        progress: Progress,
        *,
        address: str,
        stall_timeout: float,
        read: Callable[[str, int | str], str | None],
        write: Callable[[str, int | str, str], None],
    ) -> None:
        limit = min(KEEPALIVE_SECONDS, stall_timeout) if stall_timeout > 0 else KEEPALIVE_SECONDS
        self._rank, self._progress, self._address = rank, progress, address
        self._read, self._write = read, write
        self._links = Links(limit)
        self._host = socket.gethostname()
        self._hosts: dict[int, str] = {}
        self._asked = False
        self._warned = False
        self._beats: dict[int, tuple[str | None, float]] = {}
        if rank == 0 and address:
            with contextlib.suppress(OSError):
                write("link", 0, self._links.serve())

    def close(self) -> None:
        """End all connections."""
        self._links.close()

    @property
    def losing(self) -> bool:
        """Whether a host may be gone: in a few seconds that is known, and said by one rank."""
        return self._warned or bool(self._links.lost())

    def look(self, hosts: Mapping[int, str], left: Mapping[int, str]) -> Verdict | None:
        """The verdict on a host that is gone.

        Args:
            hosts: rank -> host, of the ranks that have joined.
            left: rank -> state, of those that have said how they ended.
        """
        self._hosts = dict(hosts)
        first, lost = hosts.get(0), self._links.lost()
        if first is None:
            return None
        if not self._asked and first != self._host and (told := self._read("link", 0)) is not None:
            self._asked = True
            with contextlib.suppress(OSError):  # without a way there, beats must do
                self._links.connect(0, self._address, told, self._rank)
        if lost and not self._warned:
            self._write("losing", "all", "")
        self._warned = self._warned or self._read("losing", "all") is not None
        judged = {host for host in hosts.values() if host != self._host} if self._rank == 0 else {first}
        if not lost or self._rank not in (0, self._first_elsewhere()):
            return None
        for host in sorted(judged - {self._host}):
            ranks = [rank for rank in self._on(host) if rank not in left]
            heard = any(left.get(rank) == "failed" for rank in self._on(host))  # who lives there has told
            if ranks and not heard and self._is_gone(ranks, lost):
                return Verdict(ranks=tuple(ranks), silent=True, text=self._text(ranks))
        return None

    def without_store(self, answered: float, at: float) -> tuple[str, bool] | None:
        """Where rank 0 is gone and the store with it, which last ``answered`` then: what to say, and whether
        this rank says it. Of the other ranks of that host nothing is known."""
        since = self._links.lost().get(0) if self._rank else None
        if since is None or at - max(since, answered) <= GRACE_SECONDS:
            return None
        text = (
            f"rank 0 on host {self._hosts[0]} is gone, and the run's store with it, {self._place()}: check "
            "that host, then resume from the newest checkpoint"
        )
        return text, self._rank == self._first_elsewhere()

    def _on(self, host: str) -> list[int]:
        return sorted(rank for rank, place in self._hosts.items() if place == host)

    def _first_elsewhere(self) -> int:
        return min((rank for rank, host in self._hosts.items() if host != self._hosts[0]), default=0)

    def _is_gone(self, ranks: list[int], lost: Mapping[int, float]) -> bool:
        """Whether no connection to these is left, and no new beat of any has come for a while."""
        # Rank 0 has connections to all of them, the others to rank 0 alone.
        if not (lost.keys() >= set(ranks) if self._rank == 0 else 0 in lost):
            return False
        at = time.monotonic()
        for rank in ranks:
            beat = self._read("beat", rank)
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = (beat, at)
        return all(at - self._beats[rank][1] > GRACE_SECONDS for rank in ranks)

    def _text(self, ranks: list[int]) -> str:
        return (
            f"host {self._hosts[ranks[0]]} is gone, with {rank_list(ranks)}, {self._place()}: its "
            "connections closed and it stayed silent; check that host, then resume from the newest checkpoint"
        )

    def _place(self) -> str:
        return f"after step {self._progress.step} ({self._progress.phase})"
