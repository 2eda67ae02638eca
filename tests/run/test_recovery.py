"""Whole runs with a fault in them (faulty_run.py): what they say, what they leave, how they go on.

Those with one process take seconds; the slow ones run two ranks under a real torchrun.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from argonne.checkpoint.verifier import verify_checkpoint
from argonne.testing.corpus import small_corpus
from argonne.testing.launch import (
    SCHEDULE,
    SHAPE,
    Finished,
    checkpoint,
    environment,
    launch,
    metrics,
    start,
    status,
    wait,
)
from argonne.testing.launch import command as command_of
from checkpointing import choose_checkpoint

STEPS, INTERVAL = 12, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    glob, tokenizer, _ = small_corpus(tmp_path_factory.mktemp("corpus"), documents=90, length=600)
    flags = ["--tokenizer-path", str(tokenizer), "--data-glob", glob, *SHAPE, *SCHEDULE]
    return [*flags, "--total-steps", str(STEPS), "--checkpoint-interval", str(INTERVAL)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """Two ranks, twelve steps, nothing wrong."""
    output = tmp_path_factory.mktemp("unbroken")
    assert launch(2, *data, "--output-dir", output).code == 0
    return output


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """One process, twelve steps, nothing wrong."""
    output = tmp_path_factory.mktemp("plain")
    assert launch(1, *data, "--output-dir", output).code == 0
    return output


def assert_same_end(output: Path, unbroken: Path) -> None:
    """The last checkpoint and the metrics are those of the unbroken run, bit for bit."""
    ends = [
        torch.load(checkpoint(folder, STEPS), weights_only=True, mmap=True) for folder in (output, unbroken)
    ]
    for name, tensor in ends[1]["model_state_dict"].items():
        assert torch.equal(ends[0]["model_state_dict"][name], tensor), name
    for index, state in ends[1]["optimizer_state_dict"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(ends[0]["optimizer_state_dict"]["state"][index][key], tensor), (index, key)
    for key in ("step", "loss", "grad_norm", "stream_hash", "tokens_processed"):
        assert [line[key] for line in metrics(output)] == [line[key] for line in metrics(unbroken)]


def the_error(finished: Finished) -> str:
    (line,) = finished.errors()
    return line


def saved_steps(output: Path) -> list[int]:
    return [int(path.stem.rpartition("_")[2]) for path in (output / "pretrained").glob("*.pth")]


# ---------------------------------------------------------------------------------------------------
# One process


def test_skipped_steps_are_recorded_and_too_many_end_the_run(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "nan", "first": 3, "last": 4, "gradient": "blocks.1.mlp.up_proj.weight"}
    finished = launch(1, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 0 and finished.stderr.count("a step was skipped") == 2, finished.stderr
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4]
    assert all(line["data_position"]["file_name"] for line in lines)
    fault = {"kind": "nan", "first": 2, "last": 99}
    finished = launch(1, *data, "--force-from-scratch", "--output-dir", tmp_path, fault=fault)
    assert finished.code == 1 and "too many steps in a row, up to step 11" in the_error(finished)
    assert f"holds checkpoints up to step {STEPS}, and this run starts at step 0" in finished.stderr
    stand = status(tmp_path)
    assert stand["state"] == "failed" and "too many steps in a row" in stand["reason"]
    assert [line["loss"] for line in metrics(tmp_path)][1:] == [None] * 10
    for path in (tmp_path / "pretrained").iterdir():
        assert verify_checkpoint(path).step in (4, 8, 12)  # saved between bad steps: the weights are good


def test_a_disk_that_fills_up_ends_the_run_with_its_last_save_named(tmp_path: Path, data: list[str]) -> None:
    size = 1_000_000
    finished = launch(
        1, *data, "--output-dir", tmp_path, fault={"kind": "full", "where": ".saving", "bytes": size}
    )
    line = the_error(finished)
    assert finished.code == 1 and "pretrained is full (it needs" in line and "make room" in line
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["step"] == INTERVAL
    assert list((tmp_path / "pretrained").iterdir()) == []
    fault = {"kind": "full", "where": "training_metrics", "bytes": 600}
    finished = launch(1, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 0 and "training goes on" in finished.stderr
    assert verify_checkpoint(checkpoint(tmp_path, STEPS)).step == STEPS


def test_a_last_save_that_the_disk_spoils_is_written_again(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", STEPS]
    finished = launch(1, *flags, fault={"kind": "spoil", "times": 1})
    assert finished.code == 0 and "does not match its checksum" in finished.stderr
    assert verify_checkpoint(checkpoint(tmp_path, STEPS)).step == STEPS
    finished = launch(1, *flags, "--force-from-scratch", fault={"kind": "spoil", "times": 9})
    assert finished.code == 1 and "does not match its checksum" in the_error(finished)
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["checkpoint"] is None


def test_a_checkpoint_that_the_disk_spoils_is_followed_by_another_at_once(
    tmp_path: Path, data: list[str]
) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", 40, "--total-steps", 80]
    finished = launch(1, *flags, fault={"kind": "spoil", "times": 1})
    assert finished.code == 0, finished.stderr
    (warning,) = [line for line in finished.stderr.splitlines() if line.startswith("warning: ")]
    assert "step_40.pth" in warning and warning.endswith("and another is saved at once")
    first, last = sorted(saved_steps(tmp_path))  # the spoiled one went when its successor had verified
    assert 40 < first < 80 and last == 80
    assert verify_checkpoint(checkpoint(tmp_path, first)).step == first


@pytest.mark.slow
def test_a_disk_that_spoils_every_checkpoint_does_not_save_at_every_step(
    tmp_path: Path, data: list[str]
) -> None:
    flags = [*data, "--output-dir", tmp_path, "--checkpoint-interval", 40, "--total-steps", 120]
    finished = launch(1, *flags, fault={"kind": "spoil", "times": 99})
    assert finished.code == 1 and "does not match its checksum" in the_error(finished)
    assert finished.stderr.count("another is saved at once") == 2
    assert finished.stderr.count("look at this disk") == 2
    steps = sorted(saved_steps(tmp_path))
    assert len(steps) == 5 and {40, 80, 120} < set(steps) and steps[2] < 80
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["checkpoint"] is None


@pytest.mark.slow
def test_a_save_that_falls_due_while_the_last_is_read_back_waits(tmp_path: Path, data: list[str]) -> None:
    flags = [*data, "--output-dir", tmp_path, "--total-steps", 100, "--keep-checkpoints", 50]
    finished = launch(1, *flags, fault={"kind": "slow", "seconds": 1.0})
    assert finished.code == 0, finished.stderr
    first, count = [line for line in finished.stderr.splitlines() if "waits until the last one" in line]
    assert "(step 8)" in first and " times: " in count  # said once, and counted at the end
    steps = sorted(saved_steps(tmp_path))
    assert steps[0] == INTERVAL and steps[-1] == 100 and 3 <= len(steps) < 100 // INTERVAL
    assert any(step % INTERVAL for step in steps)  # the next boundary after the reading


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, data: list[str], plain: Path) -> None:
    finished = launch(1, *data, "--output-dir", tmp_path, fault={"kind": "clock"})
    assert finished.code == 0, finished.stderr
    assert all(0.0 < line["step_seconds"] < 60.0 for line in metrics(tmp_path))
    assert_same_end(tmp_path, plain)
    again = launch(1, *data, "--output-dir", tmp_path, "--total-steps", STEPS + 1, fault={"kind": "clock"})
    assert again.code == 0 and f"(step {STEPS})" in again.stdout


def test_a_damaged_newest_checkpoint_costs_its_steps_only(
    tmp_path: Path, data: list[str], plain: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(plain, output)
    path = checkpoint(output, STEPS)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 2]))
    named = launch(1, *data, "--output-dir", output, "--checkpoint-path", path)
    assert named.code == 1 and "does not match its checksum" in the_error(named)
    again = launch(1, *data, "--output-dir", output)
    assert again.code == 0 and f"(step {STEPS - INTERVAL})" in again.stdout, again.stderr
    assert f"warning: passed over checkpoint {path}" in again.stderr
    assert_same_end(output, plain)
    for saved in (output / "pretrained").iterdir():
        saved.write_bytes(saved.read_bytes()[:-1])
    lost = launch(1, *data, "--output-dir", output)
    assert lost.code == 1 and "none of the 3 checkpoints in" in the_error(lost)
    assert "Step" not in lost.stdout and status(output)["state"] == "failed"


def test_a_run_whose_stdout_is_closed_trains_on(tmp_path: Path, data: list[str]) -> None:
    flags = command_of(1, *data, "--log-interval", 1, "--output-dir", tmp_path)
    ended = subprocess.run(
        ["bash", "-c", 'exec "$@" >&-', "bash", *flags], env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert len(metrics(tmp_path)) == STEPS and status(tmp_path)["state"] == "finished"


# ---------------------------------------------------------------------------------------------------
# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 64 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_really_full_disk(small_disk: Path, data: list[str]) -> None:
    refused = launch(
        1, *data, "--checkpoint-interval", 1, "--keep-checkpoints", 9, "--output-dir", small_disk
    )
    line = the_error(refused)
    assert refused.code == 1 and "bytes free for 10 checkpoints (those kept and one more) and has" in line
    process = start(2, *data, "--output-dir", small_disk, "--total-steps", 5000)
    while not checkpoint(small_disk, INTERVAL).exists():
        time.sleep(0.02)
        assert process.poll() is None
    with (small_disk / "filler").open("wb") as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    finished = wait(process)
    line = the_error(finished)
    assert finished.code == 1 and ("is full" in line or "bytes free" in line), line
    names = [path.name for path in (small_disk / "pretrained").iterdir()]
    assert names and not any(name.startswith(".") for name in names)
    for name in names:
        verify_checkpoint(small_disk / "pretrained" / name)
    (small_disk / "filler").unlink()
    last = max(int(name.rpartition("_")[2].removesuffix(".pth")) for name in names)
    again = launch(2, *data, "--output-dir", small_disk, "--total-steps", last + 2)
    assert again.code == 0 and f"(step {last})" in again.stdout, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "text"), [("EROFS", "Read-only file system"), ("EIO", "Input/output error")]
)
def test_a_disk_that_fails_in_a_save(tmp_path: Path, data: list[str], error: str, text: str) -> None:
    fault = {"kind": "full", "where": ".saving", "bytes": 15_000_000, "error": error}
    finished = launch(2, *data, "--output-dir", tmp_path, fault=fault)
    assert finished.code == 1 and f"could not be written: {text}" in the_error(finished)
    assert status(tmp_path)["state"] == "failed"
    assert [path.name for path in (tmp_path / "pretrained").iterdir()] == [
        checkpoint(tmp_path, INTERVAL).name
    ]
    verify_checkpoint(checkpoint(tmp_path, INTERVAL))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_built(
    small_disk: Path, data: list[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    finished = launch(2, *data, "--output-dir", small_disk / "run")
    line = the_error(finished)
    assert finished.code == 1 and "cannot be made or written (Read-only file system)" in line
    assert "Model:" not in finished.stdout


# ---------------------------------------------------------------------------------------------------
# Two ranks, killed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rank_0_killed_at_file_operations_of_a_save(tmp_path: Path, data: list[str], unbroken: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = random.Random(seed)
    for operation in [1, 2, *(rng.randrange(3, 200) for _ in range(4)), *range(250, 850, 100)]:
        output = tmp_path / str(operation)
        fault = {"kind": "kill", "save": 2, "operation": operation}
        broken = launch(2, *data, "--output-dir", output, fault=fault)
        if broken.code == 1:  # otherwise the save had fewer operations than that
            assert "rank 0 died after step " in the_error(broken), operation
            assert status(output)["state"] == "failed"
            choice = choose_checkpoint(None, output)
            assert choice.reader is not None and choice.reader.step in (4, 8, 12) and not choice.warnings
            assert launch(2, *data, "--output-dir", output).code == 0
        assert_same_end(output, unbroken)
        assert not list((output / "pretrained").glob(".*"))
        shutil.rmtree(output)


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
    began = time.monotonic()
    finished = launch(2, *data, "--output-dir", tmp_path, fault=fault)
    assert time.monotonic() - began < 60.0
    assert finished.code == 1 and "rank 1 died after step 4 (save)" in the_error(finished)
    assert status(tmp_path)["state"] == "failed" and list((tmp_path / "pretrained").glob("*.pth")) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_fault_of_the_program_shows_its_traceback_and_ends_all_ranks(
    tmp_path: Path, data: list[str], victim: int
) -> None:
    began = time.monotonic()
    fault = {"kind": "bug", "rank": victim, "step": 6}
    finished = launch(2, *data, "--output-dir", tmp_path, fault=fault)
    assert time.monotonic() - began < 90.0
    assert finished.code == 1 and finished.errors() == []
    assert finished.stderr.count("TypeError: a fault of this program") == 1
    stand = status(tmp_path)
    assert (stand["state"], stand["final"]) == ("failed", False)
    assert "an unexpected error, whose traceback is on stderr" in stand["reason"]
    assert stand["checkpoint"] == str(checkpoint(tmp_path, INTERVAL))


# ---------------------------------------------------------------------------------------------------
# Two ranks: signals in each phase, restarts, disagreement


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("phase", ["step", "save", "sample"])
def test_a_signal_in_any_phase_stops_saves_and_goes_on(
    tmp_path: Path, data: list[str], unbroken: Path, number: str, phase: str
) -> None:
    flags = [*data, "--sample-interval", 3, "--output-dir", tmp_path]
    fault = {"kind": "signal", "rank": 1, "number": number, "phase": phase, "step": 6}
    stopped = launch(2, *flags, fault=fault)
    assert stopped.errors() == [], stopped.stderr
    stand = status(tmp_path)
    assert stand["state"] == "stopped" and stand["reason"] == f"{number} to rank 1"
    assert "exitcode  : 75" in stopped.stderr and 0 < stand["step"] < STEPS
    assert stand["checkpoint"] == str(checkpoint(tmp_path, stand["step"]))
    assert launch(2, *flags).code == 0
    assert_same_end(tmp_path, unbroken)


RESTARTS = ("--standalone", "--max-restarts=1")


@pytest.mark.slow
@pytest.mark.parametrize("begin", [["--force-from-scratch"], ["--checkpoint-path", "NONE"], ["first"]])
def test_a_restart_goes_on_from_the_launchs_last_save_whatever_it_began_with(
    tmp_path: Path, data: list[str], unbroken: Path, begin: list[str]
) -> None:
    if begin == ["first"]:
        begin = ["--checkpoint-path", str(checkpoint(unbroken, INTERVAL))]
        (tmp_path / "stats").mkdir()
        shutil.copy(unbroken / "stats" / "training_metrics.jsonl", tmp_path / "stats")
    fault = {"kind": "exit", "rank": 1, "step": 11, "attempt": 0}
    finished = wait(start(2, *data, *begin, "--output-dir", tmp_path, torchrun=RESTARTS, fault=fault))
    assert finished.code == 0, finished.stderr
    assert "rank 1 died after step 10" in the_error(finished)
    assert f"step_8.pth (step {8})" in finished.stdout  # the second start
    assert status(tmp_path)["restart_count"] == 1
    assert_same_end(tmp_path, unbroken)


@pytest.mark.slow
def test_too_many_steps_that_are_not_finite_are_not_trained_again(tmp_path: Path, data: list[str]) -> None:
    """The restart would go on from the last save with the same tokens."""
    fault = {"kind": "nan", "rank": 1, "first": 6, "last": 99}
    flags = [*data, "--output-dir", tmp_path, "--total-steps", 60]
    finished = wait(start(2, *flags, torchrun=RESTARTS, fault=fault))
    first, again = finished.errors()
    assert finished.code == 1 and "not finite in too many steps in a row, up to step 15" in first
    assert "a restart would end the same way" in again and "too many steps in a row" in again
    stand = status(tmp_path)
    assert (stand["state"], stand["final"], stand["restart_count"]) == ("failed", True, 0)
    assert len(metrics(tmp_path)) == 15
    for path in (tmp_path / "pretrained").iterdir():
        assert verify_checkpoint(path).step in (4, 8, 12)


@pytest.mark.slow
def test_a_stop_before_the_first_step_is_not_restarted(tmp_path: Path, data: list[str]) -> None:
    process = start(2, *data, "--output-dir", tmp_path, torchrun=RESTARTS)
    while not (tmp_path / "stats" / "run_status.json").exists():
        time.sleep(0.01)
    os.kill(status(tmp_path)["pid"], signal.SIGTERM)
    finished = wait(process)
    stand = status(tmp_path)
    if stand["step"] is None:  # it came in time
        assert stand["state"] == "stopped" and stand["restart_count"] == 0
        assert finished.code == 0 and finished.errors() == [], finished.stderr


@pytest.mark.slow
def test_a_save_longer_than_torchruns_patience_is_said_at_the_start(tmp_path: Path, data: list[str]) -> None:
    (tmp_path / "stats").mkdir()
    measured = {"checkpoint_bytes": 1_000_000, "checkpoint_seconds": 10.0, "step_seconds": 1.0}
    path = tmp_path / "stats" / "current_training_stats_tensor_parallel_step_99.json"
    path.write_text(json.dumps(measured))
    flags = [*data, "--output-dir", tmp_path, "--total-steps", 6]
    short = launch(2, *flags)
    assert short.code == 0, short.stderr
    assert "but torchrun kills its workers 30 s after a signal: start it with --shutdown-timeout 600" in (
        short.stderr
    )
    path.write_text(json.dumps(measured))
    patient = ("--standalone", "--shutdown-timeout=600")
    enough = wait(start(2, *flags, "--force-from-scratch", torchrun=patient))
    assert enough.code == 0 and "--shutdown-timeout" not in enough.stderr, enough.stderr


@pytest.mark.slow
def test_a_rank_that_dies_before_the_first_step_is_started_again(tmp_path: Path, data: list[str]) -> None:
    process = start(2, *data, "--output-dir", tmp_path, torchrun=RESTARTS)
    while not (tmp_path / "stats" / "run_status.json").exists():
        time.sleep(0.01)
    rank_0 = status(tmp_path)["pid"]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (rank_1,) = [
        int(pid)
        for pid in children
        if int(pid) != rank_0 and b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(rank_1, signal.SIGKILL)
    finished = wait(process)
    assert finished.code == 0 and "rank 1 died" in the_error(finished), finished.stderr
    stand = status(tmp_path)
    assert (stand["state"], stand["step"], stand["restart_count"]) == ("finished", STEPS, 1)


@pytest.mark.slow
def test_a_changed_copy_is_noticed(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "perturb", "rank": 1, "step": 6, "name": "blocks.1.input_norm.weight"}
    flags = [*data, "--output-dir", tmp_path, "--replica-check-interval", 5]
    finished = launch(2, *flags, fault=fault)
    line = the_error(finished)
    assert finished.code == 1 and "blocks.1.input_norm.weight is no longer the same on all ranks" in line
    assert "rank 1 differs from rank 0" in line
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["step"] == 10


@pytest.mark.slow
def test_not_finite_on_one_rank_is_skipped_on_all(tmp_path: Path, data: list[str]) -> None:
    fault = {"kind": "nan", "rank": 1, "first": 3, "last": 4}
    finished = launch(2, *data, "--output-dir", tmp_path, "--replica-check-interval", 1, fault=fault)
    assert finished.code == 0, finished.stderr
    assert [line["step"] for line in metrics(tmp_path) if line.get("skipped")] == [3, 4]


@pytest.mark.slow
def test_a_degree_that_does_not_fit_ends_with_code_2(tmp_path: Path, data: list[str]) -> None:
    finished = launch(2, *data, "--output-dir", tmp_path, "--tensor-parallel-size", 3)
    assert "--tensor-parallel-size 3" in the_error(finished) and "exitcode  : 2" in finished.stderr
