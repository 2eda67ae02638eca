"""The keeper, with a verifier that the test answers for: due, postponed, spoiled, saved again, pruned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config.run_options import CheckpointOptions
from argonne.errors import CheckpointError
from argonne.training.keeper import CheckpointKeeper
from argonne.training.step import Votes
from checkpointing import verify_checkpoint
from tests.training.small_run import control_and_report, run_config, trained_model


class Verifier:
    """Answers when and what the test says."""

    def __init__(self, on_verified: Callable[[Path], object]) -> None:
        self.on_verified = on_verified
        self.busy = False
        self.path: Path | None = None
        self.problem: CheckpointError | None = None

    def start(self, path: Path) -> None:
        self.busy, self.path = True, path

    def answer(self, problem: str | None = None) -> None:
        assert self.path is not None
        self.busy = False
        if problem is None:
            self.on_verified(self.path)
        else:
            self.problem = CheckpointError(f"checkpoint {self.path} {problem}")

    def poll(self) -> CheckpointError | None:
        problem, self.problem = self.problem, None
        return problem

    def wait(self) -> CheckpointError | None:
        if self.busy:
            self.answer()
        return self.poll()


class Kept:
    """A keeper, the verifier behind it and what it reported."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        monkeypatch.setattr("argonne.training.trust.BackgroundVerifier", Verifier)
        control, report = control_and_report(folder)
        self.warnings: list[str] = []
        monkeypatch.setattr(report, "warn", lambda text, detail="": self.warnings.append(f"{text} {detail}"))
        self.recorded: list[dict[str, Any]] = []
        monkeypatch.setattr(control, "record", lambda **fields: self.recorded.append(fields))
        self.folder = folder / "pretrained"
        common: dict[str, Any] = {"checkpoint_interval": 4, "keep_checkpoints": 2}
        config = run_config(folder, checkpoint=CheckpointOptions(**{**common, **options}))
        self.keeper = CheckpointKeeper(trained_model(), config, control, report)
        self.verifier: Any = self.keeper._trust._verifier
        self.recorded.clear()

    def save(self, step: int) -> Path:
        return self.keeper.save(step, {"global_step": step})

    def steps(self) -> list[int]:
        return sorted(int(path.stem.rpartition("_")[2]) for path in self.folder.glob("*.pth"))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(tmp_path, monkeypatch)


def test_due_at_every_interval(kept: Kept) -> None:
    assert [step for step in range(1, 13) if kept.keeper.due(step, Votes())] == [4, 8, 12]


def test_a_save_is_recorded_and_verified(kept: Kept) -> None:
    path = kept.save(4)
    assert path == kept.keeper.newest == kept.verifier.path and kept.keeper.busy
    assert kept.recorded == [{"checkpoint": str(path), "step": 4}]
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 4
    assert set(saved["optimizer_state_dict"]["param_groups"][0]) >= {"lr", "betas", "weight_decay"}
    kept.verifier.answer()
    assert (kept.keeper.busy, kept.keeper.spoiled(), kept.warnings) == (False, False, [])


def test_postponed_until_the_previous_one_is_verified(kept: Kept) -> None:
    """Said once; due at the first boundary after, whatever its step; then at the interval again."""
    busy = Votes(busy=True)
    kept.save(4)
    assert not any(kept.keeper.due(step, busy) for step in (5, 8, 9, 10))
    (warning,) = kept.warnings
    assert warning.startswith("checkpoint postponed: the previous one is still being verified; ")
    assert "--checkpoint-interval" in warning and warning.endswith("(step 8)")
    assert kept.keeper.due(11, Votes())
    kept.verifier.answer()
    kept.save(11)
    assert [step for step in range(12, 17) if kept.keeper.due(step, Votes())] == [12, 16]


def test_the_vote_of_another_rank_postpones_too(kept: Kept) -> None:
    assert not kept.keeper.busy
    assert not kept.keeper.due(8, Votes(busy=True)) and kept.keeper.due(9, Votes())


def test_a_spoiled_checkpoint_is_followed_by_another_at_once(kept: Kept) -> None:
    kept.save(4)
    kept.verifier.answer()
    spoiled = kept.save(8)
    kept.verifier.answer("does not match its checksum")
    assert kept.keeper.spoiled() and not kept.keeper.spoiled()  # said and asked for once
    (warning,) = kept.warnings
    assert (
        str(spoiled) in warning and "earlier checkpoints were kept, and another is saved at once" in warning
    )
    assert kept.recorded[-1]["checkpoint"].endswith("step_4.pth")  # the last that verified
    assert kept.keeper.due(9, Votes(spoiled=True)) and not kept.keeper.due(9, Votes())
    assert kept.steps() == [4, 8]
    kept.save(9)
    kept.verifier.answer()
    assert kept.steps() == [4, 9]  # the spoiled one went when its successor had verified


def test_without_a_verified_one_the_status_names_none(kept: Kept) -> None:
    kept.save(4)
    kept.verifier.answer("is damaged")
    assert kept.keeper.spoiled() and kept.recorded[-1] == {"checkpoint": None}


def test_a_disk_that_spoils_every_one_is_not_written_at_every_step(kept: Kept) -> None:
    asked = []
    for step in (4, 5, 6, 8):
        kept.save(step)
        kept.verifier.answer("is damaged")
        asked.append(kept.keeper.spoiled())
    assert asked == [True, True, False, False]
    assert "the next is saved when due: check this disk" in kept.warnings[-1]
    kept.save(12)
    kept.verifier.answer()  # whole again: the count begins anew
    kept.save(16)
    kept.verifier.answer("is damaged")
    assert kept.keeper.spoiled()


def test_a_problem_found_as_the_next_save_begins_is_not_lost(kept: Kept) -> None:
    kept.save(4)
    kept.verifier.answer("is damaged")
    kept.save(8)
    assert len(kept.warnings) == 1 and "step_4.pth is damaged" in kept.warnings[0]


def test_pruned_once_the_successor_has_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(tmp_path, monkeypatch, keep_every=8)
    for step in (4, 8, 12):
        kept.save(step)
        kept.verifier.answer()
    assert kept.steps() == [8, 12]
    kept.save(16)
    assert kept.steps() == [8, 12, 16]  # not before it verifies
    kept.verifier.answer()
    kept.save(20)
    kept.verifier.answer()
    assert kept.steps() == [8, 16, 20]  # 8 is a multiple of --keep-every


def test_the_end_waits_and_writes_a_damaged_one_again(kept: Kept) -> None:
    again: list[Path] = []
    kept.save(4)
    kept.keeper.close(lambda: pytest.fail("it verified"))
    kept.save(8)
    kept.verifier.answer("is damaged")
    kept.keeper.close(lambda: again.append(kept.save(8)))
    assert len(again) == 1 and "it is written again" in kept.warnings[-1]
    assert verify_checkpoint(again[0]).step == 8


def test_the_end_fails_where_the_disk_spoils_that_one_too(kept: Kept) -> None:
    def spoil_again() -> None:
        kept.save(4)
        kept.verifier.answer("is damaged again")

    kept.save(4)
    kept.verifier.answer("is damaged")
    with pytest.raises(CheckpointError, match="is damaged again"):
        kept.keeper.close(spoil_again)
    assert kept.recorded[-1] == {"checkpoint": None}
