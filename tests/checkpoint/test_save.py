"""Saving and loading over gloo ranks: any layout to any other, and failures that reach all ranks."""

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import argonne.checkpoint.streamed_file as checkpoint_output
from argonne.checkpoint import rows, transfer
from argonne.checkpoint.verifier import verify_checkpoint
from argonne.errors import CheckpointError, PeerError
from argonne.testing.checkpoint_samples import (
    MODEL_CONFIG,
    empty_slices,
    filled_slices,
    sample_map,
    sample_metadata,
    sample_shapes,
    save_sample,
    unsharded,
)
from argonne.testing.distributed import run_ranks
from checkpointing import (
    CheckpointView,
    clean_temporary_files,
    estimate_checkpoint_bytes,
    load_slices,
    open_chosen,
)


def _open(path: str, rank: int) -> CheckpointView:
    view, _, _ = open_chosen(path, Path(), force_from_scratch=False, rank=rank, control_group=None)
    assert view is not None
    return view


def _assert_loaded(view: CheckpointView, rank: int, tp_size: int, dp_size: int = 1) -> None:
    """Load into empty slices and compare every bit with what this rank should hold."""
    slice_map = sample_map(tp_size, dp_size=dp_size)
    parameters, adam = empty_slices(slice_map, rank)
    report = load_slices(
        view, slice_map=slice_map, rank=rank, parameters=parameters, adam=adam, control_group=None
    )
    assert report.optimizer_restored and not report.warnings
    expected_parameters, expected_adam = filled_slices(slice_map, rank)
    for name, expected in expected_parameters.items():
        assert torch.equal(parameters[name], expected), name
        for key, state in expected_adam[name].items():
            assert torch.equal(adam[name][key], state), (name, key)


@contextlib.contextmanager
def _small_chunks() -> Iterator[None]:
    """Several chunks a tensor and many writes a file, although both are small."""
    usual = rows.CHUNK_BYTES, checkpoint_output.BUFFER_BYTES
    rows.CHUNK_BYTES, checkpoint_output.BUFFER_BYTES = 1000, 4096
    try:
        yield
    finally:
        rows.CHUNK_BYTES, checkpoint_output.BUFFER_BYTES = usual


@_small_chunks()
def _save_and_load(rank: int, world_size: int, folder: str) -> bytes:
    """Save at this layout, load it and the layouts before; tensor parallel, and tp x FSDP at four ranks."""
    target = Path(folder) / f"tp{world_size}"
    path, report = save_sample(target, rank=rank, tp_size=world_size)
    assert (report is not None) == (rank == 0)
    for earlier in (1, 2, 4):
        other = Path(folder) / f"tp{earlier}" / path.name
        if earlier <= world_size:
            _assert_loaded(_open(str(other), rank), rank, world_size)
    if world_size == 4:
        mixed, _ = save_sample(Path(folder) / "mixed", rank=rank, tp_size=2, dp_size=2)
        _assert_loaded(_open(str(mixed), rank), rank, 2, 2)
        _assert_loaded(_open(str(path), rank), rank, 2, 2)
        if rank == 0:
            assert mixed.read_bytes() == path.read_bytes()
    return path.read_bytes() if rank == 0 else b""


def test_any_layout_to_any_other_bit_for_bit(tmp_path: Path) -> None:
    files = [run_ranks(_save_and_load, world_size, str(tmp_path))[0] for world_size in (1, 2, 4)]
    assert files[0] == files[1] == files[2]  # a file does not depend on the layout that wrote it
    four = tmp_path / "tp4" / "tensor_parallel_checkpoint_step_7.pth"
    for tp_size in (1, 2):  # down again, rank by rank in this process
        for rank in range(tp_size):
            slice_map = sample_map(tp_size)
            parameters, adam = empty_slices(slice_map, rank)
            view = _open(str(four), 0)
            load_slices(
                view, slice_map=slice_map, rank=rank, parameters=parameters, adam=adam, control_group=None
            )
            for name, expected in filled_slices(slice_map, rank)[0].items():
                assert torch.equal(parameters[name], expected)


def _outcome(call: Any) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "no error"


@_small_chunks()
def _failing_saves(rank: int, world_size: int, folder: str) -> dict[str, str]:
    """Every way a save can fail on rank 0 or by another rank's values; then one that succeeds."""
    told: dict[str, str] = {}
    write, written = os.write, [0]

    def full(descriptor: int, data: Any) -> int:
        written[0] += len(data)
        if written[0] > limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    for limit in (0, 9000, 60_000, 170_000):
        written[0] = 0
        if rank == 0:
            os.write = full
        told[f"full at {limit}"] = _outcome(lambda: save_sample(Path(folder), rank=rank, tp_size=world_size))
        os.write = write
    sync = os.fsync

    def failing_sync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if rank == 0:
        os.fsync = failing_sync  # type: ignore[assignment]
    told["fsync"] = _outcome(lambda: save_sample(Path(folder), rank=rank, tp_size=world_size))
    os.fsync = sync
    for what, spoiled_rank, spoil in (
        ("nan", 1, ("blocks.1.mlp.up_proj.weight", "param", float("nan"))),
        ("inf", 0, ("embed_tokens.weight", "exp_avg", float("inf"))),
    ):
        mine = spoil if rank == spoiled_rank else None
        told[what] = _outcome(
            lambda mine=mine: save_sample(Path(folder), rank=rank, tp_size=world_size, spoil=mine)
        )
    told["space"] = _outcome(
        lambda: save_sample(Path(folder), rank=rank, tp_size=world_size, spare_bytes=1 << 60)
    )
    bad = {**sample_metadata(), "loss": torch.zeros(1).numpy()[0]}
    told["metadata"] = _outcome(
        lambda: save_sample(Path(folder), rank=rank, tp_size=world_size, metadata=bad)
    )
    told["left"] = ", ".join(sorted(os.listdir(folder)))
    dist.barrier()
    path, _ = save_sample(Path(folder), rank=rank, tp_size=world_size)
    _assert_loaded(_open(str(path), rank), rank, world_size)
    return told


def test_failures_reach_all_ranks_and_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    save_sample(tmp_path, step=5)
    before = (tmp_path / "tensor_parallel_checkpoint_step_5.pth").read_bytes()
    told = run_ranks(_failing_saves, 2, str(tmp_path))
    assert told[0] == told[1]
    expected = {
        "full at 0": "is full",
        "full at 9000": "is full",
        "full at 60000": "is full",
        "full at 170000": "is full",
        "fsync": "Input/output error",
        "nan": r"blocks\.1\.mlp\.up_proj\.weight holds NaN or infinite",
        "inf": r"exp_avg of embed_tokens\.weight holds NaN or infinite",
        "space": r"needs 1,152,921,504,[\d,]+ bytes free and has [\d,]+: make room",
        "metadata": "holds a numpy.float32",
        "left": r"^tensor_parallel_checkpoint_step_5\.pth$",
    }
    for what, pattern in expected.items():
        assert re.search(pattern, told[0][what]), (what, told[0][what])
    assert (tmp_path / "tensor_parallel_checkpoint_step_5.pth").read_bytes() == before


def _blind_ranks(rank: int, world_size: int, paths: list[str]) -> tuple[int, ...]:
    """Rank 0 has one file; rank 1 has none at that path, rank 2 another of the same size."""
    with contextlib.chdir(paths[rank]):
        view = _open("tensor_parallel_checkpoint_step_7.pth", rank)
    assert view.step == 7 and (view.reader is None) == (rank in view.blind_ranks)
    _assert_loaded(view, rank, world_size)
    return view.blind_ranks


def test_ranks_without_the_file_are_served_by_rank_0(tmp_path: Path) -> None:
    folders = [tmp_path / str(rank) for rank in range(4)]
    for folder in folders:
        folder.mkdir()
    path, _ = save_sample(folders[0])
    (folders[3] / path.name).write_bytes(path.read_bytes())
    other, _ = save_sample(folders[2], metadata={**sample_metadata(), "loss": 9.5})
    assert other.stat().st_size == path.stat().st_size
    assert run_ranks(_blind_ranks, 4, [str(folder) for folder in folders]) == [(1, 2)] * 4


def _errors_are_shared(rank: int, world_size: int, folder: str) -> list[str]:
    wrong = sample_map(world_size)
    told = [_outcome(lambda: _open(f"{folder}/nowhere.pth", rank)), _outcome(lambda: _open(folder, rank))]
    view = _open(f"{folder}/nan.pth", rank)
    parameters, adam = empty_slices(wrong, rank)
    told.append(
        _outcome(
            lambda: load_slices(
                view, slice_map=wrong, rank=rank, parameters=parameters, adam=adam, control_group=None
            )
        )
    )
    return told


def test_load_errors_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    weights = {name: unsharded(name, "param") for name in sample_shapes()}
    weights["lm_head.weight"] = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"].view(-1)[-1] = float("inf")  # in the last rank's slice only
    torch.save({"model_state_dict": weights, "global_step": 3}, tmp_path / "nan.pth")
    (tmp_path / "tensor_parallel_checkpoint_step_9.pth").write_bytes(b"PK\3\4 torn")
    told = run_ranks(_errors_are_shared, 2, str(tmp_path))
    assert told[0] == told[1]
    assert "does not exist" in told[0][0]
    assert "none of the 1 checkpoints" in told[0][1] and "step_9.pth: 9 bytes, cut" in told[0][1]
    assert "embed_tokens.weight holds NaN or infinite" in told[0][2]


def test_missing_adam_state_is_said_and_restored_nowhere(tmp_path: Path) -> None:
    weights = {name: unsharded(name, "param").bfloat16() for name in sample_shapes(tied=False)}
    path = tmp_path / "streaming_checkpoint_step_3.pth"
    torch.save({"model_state_dict": weights, "global_step": 3}, path)
    slice_map = sample_map(1, tied=False)
    parameters, adam = empty_slices(slice_map, 0)
    report = load_slices(
        _open(str(path), 0), slice_map=slice_map, rank=0, parameters=parameters, adam=adam, control_group=None
    )
    assert not report.optimizer_restored
    assert report.warnings == ("Adam starts from zero: the checkpoint has no optimizer state",)
    assert all(torch.equal(parameters[name], weight.float()) for name, weight in weights.items())
    assert all(float(state["exp_avg"].abs().sum()) == 0 for state in adam.values())


def test_another_models_checkpoint_is_refused_naming_both_shapes(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)
    slice_map = sample_map(1)
    parameters, adam = empty_slices(slice_map, 0)
    view = _open(str(path), 0)
    view.shapes["norm.weight"] = (25,)
    with pytest.raises(
        CheckpointError, match=r"norm\.weight is \(25,\) in the checkpoint and \(24,\) in the"
    ):
        load_slices(view, slice_map=slice_map, rank=0, parameters=parameters, adam=adam, control_group=None)


def _rank_dies(rank: int, folder: str) -> None:
    """Rank 1 disappears at the sixth tensor; rank 0 writes down what it raised and when."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows.CHUNK_BYTES = 1000
    await_word, words = transfer.SlicePeers.await_word, [0]

    def dying(self: Any) -> None:
        words[0] += 1
        if words[0] == 6:
            os._exit(0)
        await_word(self)

    transfer.SlicePeers.await_word = dying  # type: ignore[method-assign]
    started = time.monotonic()
    try:
        save_sample(Path(folder), rank=rank, tp_size=2)
    except PeerError as error:
        Path(folder, "told").write_text(f"{time.monotonic() - started:.1f} {error}")
    os._exit(0)


def test_a_rank_that_dies_is_named_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path, step=5)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank_dies, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    seconds, told = (tmp_path / "told").read_text().split(" ", 1)
    assert float(seconds) < 20
    assert told.startswith("rank 1 left while a checkpoint was saved")
    assert sorted(child.name for child in tmp_path.glob("*[!.]*") if "checkpoint" in child.name) == [
        path.name
    ]
    verify_checkpoint(path)


def test_file_size_limit_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written: File too large"):
            save_sample(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written: "):
        save_sample(tmp_path / "file")


def test_estimate_bounds_the_file(tmp_path: Path) -> None:
    path, report = save_sample(tmp_path)
    assert report is not None and report.size == path.stat().st_size
    assert report.size <= estimate_checkpoint_bytes(sample_map(1)) <= report.size + (2 << 20)


def test_model_config_is_in_the_file(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)
    assert verify_checkpoint(path).metadata["model_config"] == {**MODEL_CONFIG, "tie_word_embeddings": True}
    assert clean_temporary_files(tmp_path) == []
