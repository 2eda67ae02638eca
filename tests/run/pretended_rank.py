"""One rank of a pretended training run: no torch, a store of files, steps of sleep.

python pretended_rank.py OPTIONS-AS-JSON
"""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from argonne.errors import DataError, RunError
from argonne.ranks.launch import Environment
from argonne.run.control import RunControl
from argonne.run.lock import prepare_output_dir
from argonne.run.stalls import GroupWork
from argonne.run.status import already_ended


class FolderStore:
    """The three methods of a store, on files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "_")

    def set(self, key: str, value: str) -> None:
        temporary = self._folder / f".{os.getpid()}.{time.monotonic_ns()}"
        temporary.write_text(value)
        os.replace(temporary, self._path(key))

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def check(self, keys: list[str]) -> bool:
        return all(self._path(key).exists() for key in keys)


COLLECTIVES = 4
"""Of a pretended device in a step."""


class Counted:
    """Collectives that a rank issued, as far as anyone asks."""

    last = "all_reduce"
    total_calls = 0


class Device:
    """A pretended GPU: it is given the collectives of a step and works through them by itself, each with the
    other ranks' devices."""

    def __init__(self, store: FolderStore, rank: int, world_size: int, options: dict[str, Any]) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._seconds = options.get("device_seconds", 0.001)
        self._stall = options.get("device_stalls_at", [-1, 0, 0])
        self.entered = self.completed = 0

    def run(self, step: int) -> None:
        for number in range(1, COLLECTIVES + 1):
            if self._stall == [self._rank, step, number]:
                time.sleep(1000)
            time.sleep(self._seconds)
            self.entered += 1
            agree(self._store, f"device{self.entered}", self._rank, self._world_size, 0)
            self.completed += 1

    def groups(self) -> dict[str, GroupWork]:
        kind = "all_reduce"
        return {"1": GroupWork(group="mesh_tp", entered=self.entered, completed=self.completed, kind=kind)}


def agree(store: FolderStore, name: str, rank: int, world_size: int, flag: int) -> int:
    """A pretended all-reduce: the sum of the flags, once all ranks have come."""
    store.set(f"{name}/{rank}", str(flag))
    keys = [f"{name}/{other}" for other in range(world_size)]
    while not store.check(keys):
        time.sleep(0.005)
    return sum(int(store.get(key)) for key in keys)


def train(options: dict[str, Any], control: RunControl, store: FolderStore) -> int:
    rank, world_size = control.rank, control.world_size
    control.join(store, "127.0.0.1" if "hosts" in options else "")
    agree(store, "joined", rank, world_size, 0)
    control.all_joined()
    if options.get("start_seconds"):
        store.set(f"starting/{rank}", "")
        time.sleep(options["start_seconds"])
    counted = Counted()
    control.progress.collectives = counted
    device = Device(store, rank, world_size, options)
    if "device_seconds" in options or "device_stalls_at" in options:
        control.progress.completed_work = device.groups
    control.begin(0)
    for step in range(1, options.get("steps", 400) + 1):
        time.sleep(options.get("step_seconds", 0.02))
        counted.total_calls += 1
        if options.get("fail_at") == [rank, step]:
            raise DataError("shard.parquet is unreadable: remove it")
        if options.get("hang_at") == [rank, step]:
            time.sleep(1000)
        if control.progress.completed_work is not None:
            given = threading.Thread(target=device.run, args=(step,), daemon=True)
            given.start()
            given.join()
        stop = agree(store, f"step{step}", rank, world_size, int(control.stop_flag))
        control.boundary(step)
        if stop:
            with control.phase("save"):
                time.sleep(options.get("save_seconds", 0.0))
                if rank == 0:
                    (control.output_dir / "saved").write_text(str(step))
                agree(store, "saved", rank, world_size, 0)
            control.record(checkpoint=f"step_{step}")
            return control.finish("stopped", control.stop_reason())
    agree(store, "done", rank, world_size, 0)
    return control.finish("finished")


def main() -> int:
    options = json.loads(sys.argv[1])
    output_dir = Path(options["output_dir"])
    environment = Environment.read()
    rank, world_size, launch = environment.rank, environment.world_size, environment.launch
    store = FolderStore(output_dir / f"store_{options.get('attempt', launch.restart_count)}")
    if "hosts" in options:
        socket.gethostname = lambda: options["hosts"][rank]
    control = RunControl(
        output_dir,
        rank=rank,
        world_size=world_size,
        launch=launch,
        max_run_time=options.get("max_run_time"),
        stall_timeout=options.get("stall_timeout", 60.0),
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    control.start()
    try:
        if rank == 0:
            if already_ended(output_dir, launch) is not None:
                print("already ended", flush=True)
                return 0
            prepare_output_dir(output_dir)
            control.claim()
            print("claimed", flush=True)
        return train(options, control, store)
    except RunError as error:
        code, line = control.fail(error)
        if line is not None:
            print(line, file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
