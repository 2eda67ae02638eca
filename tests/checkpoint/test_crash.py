"""A crash at any instant leaves the old or the new checkpoint, never neither."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from argonne.checkpoint import streamed_file
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.checkpoint_crash import (
    BUFFER_BYTES,
    NEW,
    OLD,
    ForgetfulDisk,
    assert_old_or_new,
    save_verify_prune,
)
from argonne.testing.checkpoint_samples import save_sample
from checkpointing import clean_temporary_files
from tests import ROOT


@pytest.mark.parametrize("how", [(), pytest.param(("copies",), marks=pytest.mark.slow)])
def test_kill_at_every_file_operation_of_a_save(tmp_path: Path, how: tuple[str, ...]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "argonne.testing.checkpoint_crash", str(tmp_path), *how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["operations"] > 50 and told["old"] > 40 and told["new"] >= 3, told


@pytest.mark.parametrize("from_copies", [False, True])
def test_power_loss_after_every_file_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_copies: bool
) -> None:
    folder = tmp_path / "live"
    old, _ = save_sample(folder, step=OLD)
    before = {str(old): old.read_bytes()}
    disk = ForgetfulDisk(folder)
    with monkeypatch.context() as patched:
        patched.setattr(streamed_file, "BUFFER_BYTES", BUFFER_BYTES)
        disk.install(lambda name, function: patched.setattr(os, name, function))
        save_verify_prune(folder, from_copies=from_copies)
    kinds = [event[0] for event in disk.events]
    assert {"create", "write", "fsync", "rename", "unlink"} <= set(kinds)
    steps = set()
    first = kinds.index("fsync") - 5  # before the first fsync all states are alike but for the temporary file
    for count in [0, 1, 2, *range(first, len(disk.events) + 1)]:
        for number, files in enumerate(disk.after(count, before)):
            shown = tmp_path / f"{count}_{number}"
            shown.mkdir()
            for path, data in files.items():
                (shown / Path(path).name).write_bytes(data)
            step = assert_old_or_new(shown)
            steps.add(step)
            if count == len(disk.events):
                assert step == NEW
    assert steps == {OLD, NEW}


def test_a_save_without_fsync_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "live"
    old, _ = save_sample(folder, step=OLD)
    before = {str(old): old.read_bytes()}
    disk = ForgetfulDisk(folder)
    with monkeypatch.context() as patched:
        disk.install(lambda name, function: patched.setattr(os, name, function))
        patched.setattr(os, "fsync", lambda descriptor: None)
        save_verify_prune(folder)
    names, *_ = disk.after(len(disk.events), before)
    assert not any(str(NEW) in Path(path).name for path in names)


def _save_for_ever(rank: int, folder: str, from_copies: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for step in range(6, 100_000):
        save_sample(Path(folder, "pretrained"), step, rank=rank, tp_size=2, from_copies=from_copies)


@pytest.mark.slow
@pytest.mark.parametrize("from_copies", [False, True])
def test_kill_all_ranks_at_random_instants(tmp_path: Path, from_copies: bool) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = random.Random(seed)
    context = multiprocessing.get_context("spawn")
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        save_sample(folder / "pretrained", step=OLD)
        arguments = [(rank, str(folder), from_copies) for rank in range(2)]
        ranks = [context.Process(target=_save_for_ever, args=given) for given in arguments]
        for process in ranks:
            process.start()
        while not (folder / "pretrained" / "tensor_parallel_checkpoint_step_6.pth").exists():
            time.sleep(0.01)
        time.sleep(rng.random())
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        clean_temporary_files(folder / "pretrained")
        for path in (folder / "pretrained").iterdir():
            verify_checkpoint(path)
