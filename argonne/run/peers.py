"""What this rank knows of the others: which joined, left, died, stopped or stalled.

Each rank publishes where it runs and, every second or two, its progress, through the store of the process
group (any object with its methods; nothing here knows torch). Ranks of one host also watch each other's
processes, which works when the store does not answer.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from argonne.errors import EXIT_FAILURE
from argonne.run.hosts import HostWatch
from argonne.run.processes import process_fields
from argonne.run.stalls import Beat, Progress, StallJudge, Verdict


class KeyStore(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """What a rank said when it left."""

    state: str
    """``finished``, ``stopped`` or ``failed``"""
    text: str
    final: bool = False
    """whether a restart would only repeat it"""
    code: int = EXIT_FAILURE
    """exit code of the ranks that end with it, where it stopped before the first step"""


class Peers:
    """The other ranks, as far as this one can see them.

    Args:
        store: shared by all ranks and used by this object's thread alone (give it a clone).
        address: where rank 0's host is reached by ranks of other hosts; "": nothing is connected to it.
        on_verdict: called once from the thread when the run must end: the verdict, and whether this rank is
            the one that says so.
        attempt: restarts so far; torchrun's store keeps what earlier attempts wrote.
        stall_timeout: seconds; 0: stalls are not detected.
    """

    def __init__(
        self,
        store: KeyStore,
        rank: int,
        world_size: int,
        progress: Progress,
        *,
        attempt: int,
        stall_timeout: float,
        on_verdict: Callable[[Verdict, bool], None],
        address: str = "",
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._attempt = attempt
        self._progress, self._on_verdict = progress, on_verdict
        self._judge = StallJudge(stall_timeout) if stall_timeout > 0 else None
        self.interval = min(2.0, max(0.1, stall_timeout / 5)) if stall_timeout > 0 else 2.0
        self._places: dict[int, dict[str, Any]] = {}
        self._notes: dict[int, Note] = {}
        self._number = 0
        self._ending = threading.Event()
        self._wanted = threading.Event()
        self._round = threading.Condition()
        self._rounds = 0
        self.answered = time.monotonic()
        place = {"host": socket.gethostname(), "pid": os.getpid()}
        fields = process_fields(os.getpid())
        place["started"] = fields[19] if fields else ""
        self.hosts = HostWatch(
            rank, progress, address=address, stall_timeout=stall_timeout, read=self._read, write=self._write
        )
        self._write("place", rank, json.dumps(place))
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def _key(self, kind: str, rank: int | str) -> str:
        return f"argonne/run/{self._attempt}/{kind}/{rank}"

    def say_goodbye(self, note: Note) -> None:
        """Say why this rank ends, so that the others do not take it for a death; waits a second at most."""
        self._send("note", self._rank, json.dumps(dataclasses.asdict(note)))

    def ask_to_stop(self, reason: str) -> None:
        """Tell the others why this rank raises its stop flag; waits a second at most."""
        self._send("stop", "all", reason)

    def stop_reason(self) -> str | None:
        """What a rank that raised its stop flag said."""
        return self._read("stop", "all")

    def _send(self, kind: str, rank: int | str, text: str) -> None:
        def send() -> None:
            with contextlib.suppress(RuntimeError, OSError):  # the store may have gone first
                self._write(kind, rank, text)

        # A store whose process is stopped would keep us for ever.
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(1.0)

    def close(self) -> None:
        """End the thread, waiting two seconds at most; calling it again does nothing."""
        self.hosts.close()
        self._ending.set()
        self._wanted.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(2.0)

    def refresh(self, seconds: float = 2.0) -> None:
        """Wait for one round of fresh notes from the store, at most so long."""
        with self._round:
            before = self._rounds
            self._wanted.set()
            self._round.wait_for(lambda: self._rounds > before, timeout=seconds)

    def notes(self) -> dict[int, Note]:
        """What the other ranks said when they left, as far as it is known here."""
        return {rank: note for rank, note in list(self._notes.items()) if rank != self._rank}

    def wait_for_notes(self, seconds: float) -> None:
        """Wait until every other rank has said why it ends, at most so long."""
        deadline = time.monotonic() + seconds
        while len(self.notes()) < self._world_size - 1 and time.monotonic() < deadline:
            self.refresh(0.2)
            time.sleep(0.02)

    def absent(self) -> list[int]:
        """Ranks that have not joined yet, as far as it is known here."""
        return sorted(set(range(self._world_size)) - set(self._places) - {self._rank})

    def missing(self) -> list[int]:
        """Ranks of this host whose process is gone, and whose goodbye has not been heard."""
        return [rank for rank in self._local() if self._state(rank) is None and rank not in self._notes]

    def dead(self) -> list[int]:
        """The missing ranks that really left without a word; waits for the newest notes."""
        missing = self.missing()
        if missing:
            self.refresh(1.0)
        return [rank for rank in missing if rank not in self._notes]

    def stopped(self) -> list[int]:
        """Ranks of this host whose process is stopped (SIGSTOP) or traced."""
        return [rank for rank in self._local() if self._state(rank) in ("T", "t")]

    def kill(self, ranks: Iterable[int]) -> None:
        """End processes of this host that cannot end by themselves because they are stopped."""
        for rank in set(ranks) & set(self.stopped()) - {self._rank}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._places[rank]["pid"], signal.SIGKILL)

    def is_first_left(self, dead: Iterable[int]) -> bool:
        """Whether this is the lowest rank of its host that lives: the one that speaks of a death there."""
        return self._rank == min(set(self._local()) - set(dead) | {self._rank})

    def _local(self) -> list[int]:
        host = socket.gethostname()
        return [rank for rank, place in list(self._places.items()) if place["host"] == host]

    def _state(self, rank: int) -> str | None:
        place = self._places[rank]
        fields = process_fields(place["pid"])
        return None if fields is None or fields[0] in "ZX" or fields[19] != place["started"] else fields[0]

    def _run(self) -> None:
        while not self._ending.is_set():
            verdict, speaks = None, False
            # A store that does not answer died with its process; if for long, the watcher ends the run.
            with contextlib.suppress(RuntimeError, OSError):
                verdict, speaks = self._look()
                self.answered = time.monotonic()
            with self._round:
                self._rounds += 1
                self._round.notify_all()
            if verdict is not None and not self._ending.is_set():
                self._on_verdict(verdict, speaks)
                return
            self._wanted.wait(self.interval)
            self._wanted.clear()

    def _look(self) -> tuple[Verdict | None, bool]:
        self._number += 1
        progress = self._progress
        beat = Beat(
            number=self._number,
            step=progress.step,
            phase=progress.phase,
            work=progress.work,
            collective=progress.collective,
            groups={} if self._judge is None else progress.device_work(self._judge.timeout / 2),
        )
        self._write("beat", self._rank, beat.text())
        for rank in range(self._world_size):
            if rank not in self._places and (place := self._read("place", rank)) is not None:
                self._places[rank] = json.loads(place)
            if rank not in self._notes and (note := self._read("note", rank)) is not None:
                self._notes[rank] = Note(**json.loads(note))
        spoken = self._read("verdict", "all")
        if spoken is not None:
            fields = json.loads(spoken)
            return Verdict(ranks=tuple(fields["ranks"]), silent=fields["silent"], text=fields["text"]), False
        places = {rank: place["host"] for rank, place in self._places.items()}
        left = {rank: note.state for rank, note in self._notes.items()}
        verdict = self.hosts.look(places, left) or self._judge_beats()
        if verdict is not None:
            self._write("verdict", "all", json.dumps(dataclasses.asdict(verdict)))
        return verdict, verdict is not None

    def _judge_beats(self) -> Verdict | None:
        """Rank 0 watches all, and rank 1 watches rank 0."""
        if self._judge is None or self._rank > 1:
            return None
        watched = range(self._world_size) if self._rank == 0 else (0, 1)
        beats = {}
        for rank in watched:
            if rank not in self._notes and (text := self._read("beat", rank)) is not None:
                beats[rank] = Beat.read(text)
        verdict = self._judge.observe(beats, time.monotonic()) if beats else None
        return verdict if verdict is None or self._rank == 0 or verdict.silent else None

    def _read(self, kind: str, rank: int | str) -> str | None:
        key = self._key(kind, rank)
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _write(self, kind: str, rank: int | str, text: str) -> None:
        self._store.set(self._key(kind, rank), text)
