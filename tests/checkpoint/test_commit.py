"""Temporary files: gone after a failure, kept while a save holds them."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.checkpoint.commit import (
    TEMPORARY_SUFFIX,
    clean_temporary_files,
    commit,
    failure_reason,
    temporary_file,
)
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError
from argonne.testing.checkpoint_samples import save_sample


def test_stale_temporary_files_are_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)
    stale = tmp_path / f".{path.name}.somehost.123.saving"
    foreign = tmp_path / ".notes.saving"
    for file in (stale, foreign):
        file.write_bytes(b"half")
    program = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    held = tmp_path / f".{path.name}.somehost.124.saving"
    holder = subprocess.Popen([sys.executable, "-c", program, str(held)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert clean_temporary_files(tmp_path) == [stale.name]
        assert held.exists() and foreign.exists()
    finally:
        holder.kill()
        holder.wait()
    assert clean_temporary_files(tmp_path) == [held.name]
    verify_checkpoint(path)


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.pth"
    with temporary_file(path, 1) as (descriptor, temporary):
        assert temporary.parent == path.parent and temporary.name.endswith(TEMPORARY_SUFFIX)
        assert clean_temporary_files(path.parent) == []  # it is locked
        os.write(descriptor, b"half")
        with pytest.raises(CheckpointError, match="the disk kept 4 of 5 bytes"):
            commit(descriptor, temporary, path, 5)
        with pytest.raises(CheckpointError, match="cut or damaged"):
            commit(descriptor, temporary, path, 4)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(CheckpointError, match="bytes free"), temporary_file(path, 1 << 62):
        pytest.fail("no room was needed")
    assert list(path.parent.iterdir()) == []


def test_the_reason_of_a_failure(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert re.search(
        r"is full \(it needs 1,000 bytes and has [\d,]+ free", failure_reason(full, tmp_path, 1000)
    )
    assert re.search(r"is full \(it has [\d,]+ free", failure_reason(full, tmp_path))
    assert failure_reason(OSError(errno.EIO, "Input/output error"), tmp_path) == "Input/output error"
