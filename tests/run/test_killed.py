"""Whole runs of two ranks under a real torchrun that are killed: the next one ends as if nothing had been."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.launch import checkpoint, launch, start, status
from checkpointing import choose_checkpoint
from tests.run.whole_runs import INTERVAL, assert_same_end, the_error


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_rank_killed_at_file_operations_of_a_save(
    tmp_path: Path, data: list[str], unbroken: Path, mode: str, victim: int
) -> None:
    """At any one: a write between the headers, an fsync, the rename; of rank 1 a write of its part."""
    flags = [*data, "--async-checkpoint", mode]
    killed = 0
    for operation in (1, 2, 4, 7, 11, 16) if victim == 0 else (1, 3, 5):
        output = tmp_path / str(operation)
        fault = {"kind": "kill", "rank": victim, "save": 2, "operation": operation}
        broken = launch(2, *flags, "--output-dir", output, fault=fault)
        if broken.code == 1:  # otherwise the save had fewer operations than that
            killed += 1
            assert f"rank {victim} died after step " in the_error(broken), operation
            assert status(output)["state"] == "failed"
            choice = choose_checkpoint(None, output)
            assert choice.reader is not None and choice.reader.step in (4, 8, 12) and not choice.warnings
            assert launch(2, *flags, "--output-dir", output).code == 0
        assert_same_end(output, unbroken)
        assert not list((output / "pretrained").glob(".*"))
        shutil.rmtree(output)
    assert killed >= 2


@pytest.mark.slow
def test_all_ranks_killed_at_random_instants_until_the_run_is_done(
    tmp_path: Path, data: list[str], unbroken: Path
) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = random.Random(seed)
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", 1]
    for _ in range(8):
        process = start(2, *flags)
        path, lines = tmp_path / "stats" / "training_metrics.jsonl", rng.randrange(1, 4)
        before = path.read_text().count("\n") if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.read_text().count("\n") < before + lines):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in [*(children.read_text().split() if children.exists() else ()), process.pid]:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.communicate()
        for saved in (tmp_path / "pretrained").glob("*.pth"):
            verify_checkpoint(saved)
    finished = launch(2, *flags)
    assert finished.code == 0, finished.stderr
    assert_same_end(tmp_path, unbroken)


@pytest.mark.slow
def test_a_rank_that_dies_in_a_save_is_named(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "signal", "rank": 1, "number": "SIGKILL", "phase": "save"}
    finished = launch(2, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 1 and "rank 1 died after step 4 (save)" in the_error(finished)
    assert status(tmp_path)["state"] == "failed" and list((tmp_path / "pretrained").glob("*.pth")) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_fault_of_the_program_shows_its_traceback_and_ends_all_ranks(
    tmp_path: Path, data: list[str], victim: int
) -> None:
    fault = {"kind": "bug", "rank": victim, "step": 6}
    finished = launch(2, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 1 and finished.errors() == []
    assert finished.stderr.count("TypeError: a fault of this program") == 1
    stand = status(tmp_path)
    assert (stand["state"], stand["final"]) == ("failed", False)
    assert "an unexpected error, whose traceback is on stderr" in stand["reason"]
    assert stand["checkpoint"] == str(checkpoint(tmp_path, INTERVAL))
