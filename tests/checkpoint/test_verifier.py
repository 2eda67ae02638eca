"""Reading a new checkpoint back in the background; nothing is pruned on the word of a damaged one."""

import threading
from pathlib import Path

from argonne.checkpoint.verifier import BackgroundVerifier
from argonne.testing.checkpoint_samples import save_sample
from checkpointing import (
    checkpoint_path,
    own_checkpoints,
    prune,
)
from tests.checkpoint.odd_files import damage


def _steps(folder: Path) -> list[int]:
    return sorted(step for step, _ in own_checkpoints(folder))


def test_a_damaged_new_file_keeps_its_predecessors(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_sample(tmp_path, step)
    verifier = BackgroundVerifier(lambda path: prune(tmp_path, newest_verified=path, keep=1))
    damage(checkpoint_path(tmp_path, 3))
    verifier.start(checkpoint_path(tmp_path, 3))
    problem = verifier.wait()
    assert problem is not None and "step_3.pth" in str(problem)
    assert _steps(tmp_path) == [1, 2, 3] and verifier.poll() is None
    save_sample(tmp_path, 4)
    verifier.start(checkpoint_path(tmp_path, 4))
    assert verifier.wait() is None and not verifier.busy
    assert _steps(tmp_path) == [4]


def test_a_problem_is_told_once(tmp_path: Path) -> None:
    verified: list[Path] = []
    verifier = BackgroundVerifier(verified.append)
    assert verifier.poll() is None and verifier.wait() is None and not verifier.busy
    verifier.start(tmp_path / "gone.pth")
    problem = verifier.wait()
    assert problem is not None and "gone.pth" in str(problem) and verified == []
    assert verifier.poll() is None and verifier.wait() is None
    path, _ = save_sample(tmp_path)
    verifier.start(path)
    assert verifier.wait() is None and verified == [path]


def test_it_is_busy_until_pruning_has_ended(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)
    may_end = threading.Event()
    verifier = BackgroundVerifier(lambda _: may_end.wait(60))
    verifier.start(path)
    assert verifier.busy and verifier.poll() is None
    may_end.set()
    assert verifier.wait() is None and not verifier.busy


def test_an_error_while_pruning_is_a_problem_of_the_checkpoint(tmp_path: Path) -> None:
    path, _ = save_sample(tmp_path)

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    verifier = BackgroundVerifier(refuse)
    verifier.start(path)
    problem = verifier.wait()
    assert problem is not None and str(problem) == f"checkpoint {path}: Permission denied"
