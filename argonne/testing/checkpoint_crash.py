"""What can go wrong below a save: a kill at any file operation, and a disk that forgets what was not synced.

Run as a program (``checkpoint_crash.py FOLDER [copies]``) it saves step 7 over step 5 (from copies in host
memory), verifies, prunes, once for every file operation, in a child that kills itself there, and checks what
is left each time.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import argonne.checkpoint.streamed_file as streamed_file
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.checkpoint_samples import save_sample
from checkpointing import choose_checkpoint, clean_temporary_files, prune

OPERATIONS = ("open", "write", "pwrite", "ftruncate", "fsync", "replace", "unlink", "close")
OLD, NEW = 5, 7
BUFFER_BYTES = 4096
"""Of a save here, in place of megabytes: so that a small checkpoint takes many writes."""


def save_verify_prune(folder: Path, *, from_copies: bool = False) -> None:
    """The life of one save."""
    path, _ = save_sample(folder, step=NEW, from_copies=from_copies)
    verify_checkpoint(path)
    prune(folder, newest_verified=path, keep=1)


def assert_old_or_new(folder: Path) -> int:
    """Invariant: automatic choice finds the old or the new checkpoint whole; return its step."""
    choice = choose_checkpoint(str(folder), folder)
    assert choice.reader is not None
    assert choice.reader.step in (OLD, NEW)
    assert not choice.warnings, choice.warnings
    return choice.reader.step


def kill_at(operation: int) -> list[int]:
    """Let this process die of SIGKILL at its ``operation``-th file operation, a write being half done.

    Returns the counter of operations.
    """
    count = [0]

    def dying(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == operation:
                if name in ("write", "pwrite") and len(args[1]) > 1:
                    with contextlib.suppress(OSError):  # a disk that takes whole blocks only
                        original(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, dying(name, getattr(os, name)))
    return count


def run_child(folder: Path, old: Path, operation: int, from_copies: bool) -> tuple[bool, int]:
    """Save in a child that dies at ``operation``; whether it did, and the operations it counted if not."""
    folder.mkdir()
    shutil.copyfile(old, folder / old.name)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = kill_at(operation)
        save_verify_prune(folder, from_copies=from_copies)
        with open(writing, "w") as told:
            told.write(str(count[0]))
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        counted = told.read()
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), int(counted or 0)


def main(folder: Path, from_copies: bool) -> None:
    torch.set_num_threads(1)
    streamed_file.BUFFER_BYTES = BUFFER_BYTES
    old, _ = save_sample(folder / "old", step=OLD)
    _, total = run_child(folder / "whole", old, 0, from_copies)
    seen: list[int] = []
    for operation in range(1, total + 1):
        target = folder / str(operation)
        killed, _ = run_child(target, old, operation, from_copies)
        assert killed, f"operation {operation} of {total} did not happen"
        seen.append(assert_old_or_new(target))
        clean_temporary_files(target)
        assert all(path.suffix == ".pth" for path in target.iterdir()), list(target.iterdir())
        shutil.rmtree(target)
    print(json.dumps({"operations": total, "old": seen.count(OLD), "new": seen.count(NEW)}))


@dataclass
class ForgetfulDisk:
    """Records what a process does to a folder; shows it as it would be after the power failed.

    Only what was fsynced is sure: the bytes of a file at its last fsync, the names of the folder at its
    last fsync. The rest may be there or not; ``after`` gives the extreme cases.
    """

    folder: Path
    events: list[tuple[Any, ...]] = field(default_factory=list)
    _paths: dict[int, str] = field(default_factory=dict)

    def install(self, patch: Callable[[str, Any], None]) -> None:
        """Replace the functions of ``os`` through ``patch(name, function)``."""
        original = {name: getattr(os, name) for name in OPERATIONS}
        inside = str(self.folder)

        def opened(path: Any, *args: Any, **kwargs: Any) -> int:
            descriptor: int = original["open"](path, *args, **kwargs)
            if str(path).startswith(inside):
                self._paths[descriptor] = str(path)
                self.events.append(("create", str(path)))
            return descriptor

        def wrote(descriptor: int, data: Any) -> int:
            position = os.lseek(descriptor, 0, os.SEEK_CUR) if descriptor in self._paths else 0
            count: int = original["write"](descriptor, data)
            self._write(descriptor, position, bytes(data[:count]))
            return count

        def wrote_at(descriptor: int, data: Any, position: int) -> int:
            self._write(descriptor, position, bytes(data))
            return int(original["pwrite"](descriptor, data, position))

        def cut(descriptor: int, size: int) -> None:
            if descriptor in self._paths:
                self.events.append(("truncate", self._paths[descriptor], size))
            original["ftruncate"](descriptor, size)

        def synced(descriptor: int) -> None:
            self.events.append(("fsync", self._paths[descriptor]))
            original["fsync"](descriptor)

        def renamed(source: Any, target: Any) -> None:
            self.events.append(("rename", str(source), str(target)))
            original["replace"](source, target)

        def removed(path: Any) -> None:
            original["unlink"](path)
            self.events.append(("unlink", str(path)))

        def closed(descriptor: int) -> None:
            self._paths.pop(descriptor, None)
            original["close"](descriptor)

        functions = (opened, wrote, wrote_at, cut, synced, renamed, removed, closed)
        for name, function in zip(OPERATIONS, functions, strict=True):
            patch(name, function)

    def _write(self, descriptor: int, position: int, data: bytes) -> None:
        if descriptor in self._paths:
            self.events.append(("write", self._paths[descriptor], position, data))

    def after(self, count: int, before: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
        """The folder's files after ``count`` events and a power failure: two extremes.

        First: every unsynced write and name is lost. Second: names are all there (the journal was written),
        unsynced bytes are lost.
        """
        content = {name: bytearray(data) for name, data in before.items()}
        durable = dict(content)  # bytes by the object that holds them, at its last fsync
        sure: dict[int, bytes] = {id(data): bytes(data) for data in content.values()}
        names: dict[str, bytearray] = dict(content)
        for event in self.events[:count]:
            kind, path = event[0], event[1]
            if kind == "create" and path not in names and path != str(self.folder):
                names[path] = bytearray()
            elif kind == "write":
                data = names[path]
                data.extend(b"\0" * (event[2] + len(event[3]) - len(data)))
                data[event[2] : event[2] + len(event[3])] = event[3]
            elif kind == "truncate":
                del names[path][event[2] :]
            elif kind == "fsync" and path == str(self.folder):
                durable = dict(names)
            elif kind == "fsync":
                sure[id(names[path])] = bytes(names[path])
            elif kind == "rename":
                names[event[2]] = names.pop(path)
            elif kind == "unlink":
                names.pop(path, None)
        for shown in (durable, names):
            yield {path: sure.get(id(data), b"") for path, data in shown.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), "copies" in sys.argv[2:])
