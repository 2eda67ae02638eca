"""How a checkpoint's file gets its name: room on the disk, a locked temporary file, fsync, rename.

A crash at any instant leaves the file there was before, and at most a temporary file that the next run
removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from argonne.checkpoint.archive import verify_structure
from argonne.checkpoint.room import require_room
from argonne.checkpoint.tensor_file import TensorFile
from argonne.errors import CheckpointError
from argonne.files import synchronize

TEMPORARY_SUFFIX = ".saving"


@contextlib.contextmanager
def temporary_file(path: Path, need: int) -> Iterator[tuple[int, Path]]:
    """Descriptor and path of a new locked file beside ``path``, removed unless it was renamed.

    Raises CheckpointError before writing where the disk has fewer than ``need`` bytes free.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    require_room(folder, need)
    temporary = folder / f".{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY_SUFFIX}"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        yield descriptor, temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        os.close(descriptor)


def clean_temporary_files(folder: Path) -> list[str]:
    """Remove what killed saves left in a folder; return the names. Files of a save under way are kept."""
    removed = []
    for path in sorted(folder.glob(f".*.pth.*{TEMPORARY_SUFFIX}")) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(descriptor)
    return removed


def commit(descriptor: int, temporary: Path, path: Path, size: int) -> None:
    """Make the file durable, read its structure back, give it its name, make the name durable."""
    os.fsync(descriptor)
    if os.fstat(descriptor).st_size != size:
        raise CheckpointError(f"the disk kept {os.fstat(descriptor).st_size} of {size} bytes")
    verify_structure(temporary)
    TensorFile(temporary)
    os.replace(temporary, path)
    synchronize(path.parent)


def failure_reason(error: OSError, folder: Path, need: int | None = None) -> str:
    """What an OSError of a save (of ``need`` bytes, where that is known) means, for the one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            wanted = f"it needs {need:,} bytes and has" if need is not None else "it has"
            return f"{folder} is full ({wanted} {free:,} free, a quota apart): make room"
    return error.strerror or str(error)
