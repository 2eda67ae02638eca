"""Verify a checkpoint file against its checksums, at once or in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from argonne.checkpoint.archive import verify_archive
from argonne.checkpoint.parts import open_any
from argonne.checkpoint.reader import CheckpointReader
from argonne.errors import CheckpointError


def verify_checkpoint(path: Path, *, from_disk: bool = False) -> CheckpointReader:
    """Prove all bytes of a file as far as it carries proof, and open it.

    Ours is proven whole; a torch zip file by its records' checksums; a legacy file by its sizes. Raises
    CheckpointError naming the file and the damage.
    """
    reader = open_any(path)
    for file in reader.files:
        verify_file(file.path, file.serialization, from_disk=from_disk)
    return reader


def verify_file(path: Path, serialization: str, *, from_disk: bool = False) -> None:
    """Check a file's checksums; CheckpointError naming it where one does not match."""
    if serialization != "zip":
        return
    try:
        verify_archive(path, from_disk=from_disk)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error


class BackgroundVerifier:
    """Reads a new checkpoint back from the disk in a thread while training goes on, then prunes.

    ``start`` after a save, ``poll`` between steps, ``wait`` before the end. One at a time: ``busy`` says
    whether the last is still running, in which case a caller postpones its next save.
    """

    def __init__(self, on_verified: Callable[[Path], object]) -> None:
        self._on_verified = on_verified
        self._thread: threading.Thread | None = None
        self._problem: CheckpointError | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, path: Path) -> None:
        """Begin to read ``path`` back. A verification that still runs is waited for first."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(path,), name="verify-checkpoint", daemon=True)
        self._thread.start()

    def _run(self, path: Path) -> None:
        try:
            verify_checkpoint(path, from_disk=True)
            self._on_verified(path)
        except CheckpointError as error:
            self._problem = error
        except OSError as error:
            self._problem = CheckpointError(f"checkpoint {path}: {error.strerror or error}")

    def poll(self) -> CheckpointError | None:
        """The problem of a finished verification, once; its checkpoint must not be relied on."""
        if self.busy:
            return None
        problem, self._problem = self._problem, None
        return problem

    def wait(self) -> CheckpointError | None:
        """Wait for the verification under way; return what ``poll`` returns."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.poll()
