"""The keeper with saves in the background: begun, landed, failed, waited for, held back by the next one."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import argonne.training.saving as saving
from argonne.errors import CheckpointError, ConfigError
from argonne.training.step import Votes
from checkpointing import save_checkpoint, verify_checkpoint
from tests.training.small_run import control_and_report, trained_model
from tests.training.test_keeper import Kept


class Gate:
    """Lets saves in the background pass when the test says so, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.problem: Exception | None = None
        self.calls = 0
        monkeypatch.setattr(saving, "save_checkpoint", self.save)

    def save(self, path: Path, **arguments: Any) -> Any:
        self.calls += 1
        if threading.current_thread() is not threading.main_thread():
            assert self.open.wait(30)
        if self.problem is not None:
            raise self.problem
        return save_checkpoint(path, **arguments)


class Background(Kept):
    """A keeper that saves in the background, through a gate."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        super().__init__(folder, monkeypatch, async_checkpoint="on", **options)
        self.gate = Gate(monkeypatch)

    def begin(self, step: int) -> Path:
        self.gate.open.clear()
        return self.keeper.save(step, {"global_step": step}, whole=False)

    def ended(self, problem: Exception | None = None) -> None:
        """Let the save end, before the next boundary."""
        self.gate.problem = problem
        self.gate.open.set()
        thread = self.keeper._saver.running._thread
        assert thread is not None
        thread.join(30)

    def newest(self) -> Path | None:
        return self.keeper.newest

    def votes(self) -> Votes:
        return self.keeper.votes(stop=False)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    background = Background(tmp_path, monkeypatch)
    yield background
    background.gate.open.set()


def test_a_save_lands_at_the_boundary_after_its_end(kept: Background) -> None:
    path = kept.begin(4)
    assert kept.votes() == Votes() and kept.newest() is None and kept.steps() == []
    assert kept.recorded == [{"saving": 4}]
    kept.ended()
    assert kept.steps() == [4] and kept.newest() is None  # it has its name; the loop takes note next
    assert kept.votes() == Votes(busy=True)
    assert kept.recorded[-1] == {"checkpoint": str(path), "saving": None}
    assert kept.newest() == kept.verifier.path == path
    kept.verifier.answer()
    assert kept.votes() == Votes() and verify_checkpoint(path).step == 4


def test_what_is_written_is_the_step_of_the_copy(kept: Background) -> None:
    """Weights, Adam state, options and metadata change while the save waits; the file does not."""
    trained = kept.keeper._trained
    for state in trained.adam().values():
        state["exp_avg"].fill_(0.5)
    before = {name: value.clone() for name, value in trained.parameters().items()}
    metadata: dict[str, Any] = {"global_step": 4, "data_position": {"row": 3}}
    kept.gate.open.clear()
    path = kept.keeper.save(4, metadata, whole=False)
    metadata["data_position"]["row"] = 4
    trained.optimizer.param_groups[0]["lr"] = 7.0
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.add_(1.0)
    for state in trained.adam().values():
        state["exp_avg"].zero_()
        state["step"].add_(1)
    kept.ended()
    saved = torch.load(path, weights_only=True)
    assert saved["data_position"] == {"row": 3}
    assert saved["optimizer_state_dict"]["param_groups"][0]["lr"] != 7.0
    assert all(torch.equal(saved["model_state_dict"][name], value) for name, value in before.items())
    for state in saved["optimizer_state_dict"]["state"].values():
        assert float(state["step"]) == 0.0 and bool((state["exp_avg"] == 0.5).all())


def test_the_same_bytes_as_between_two_steps(kept: Background) -> None:
    path = kept.begin(4)
    kept.ended()
    kept.votes()
    kept.verifier.answer()
    written = path.read_bytes()
    assert kept.keeper.save(4, {"global_step": 4}) == path and path.read_bytes() == written


def test_an_error_is_voted_then_raised_once(kept: Background) -> None:
    kept.begin(4)
    kept.ended(CheckpointError("checkpoint X could not be written: the disk is full"))
    assert kept.votes() == Votes(failed=True) and kept.steps() == []
    with pytest.raises(CheckpointError, match="the disk is full"):
        kept.keeper.wait()
    assert kept.votes() == Votes()


def test_another_ranks_vote_makes_this_one_wait_for_its_error(kept: Background) -> None:
    kept.begin(4)
    threading.Timer(0.05, lambda: kept.ended(CheckpointError("of another rank"))).start()
    with pytest.raises(CheckpointError, match="of another rank"):
        kept.keeper.wait()


def test_an_error_that_no_one_expected_is_not_swallowed(
    kept: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    kept.begin(4)
    kept.ended(TypeError("a fault of this program"))
    assert kept.votes() == Votes(failed=True)
    with pytest.raises(RuntimeError, match="no one expected"):
        kept.keeper.wait()
    assert shown[0].exc_type is TypeError


def test_the_next_save_waits_for_the_one_before(kept: Background) -> None:
    first = kept.begin(4)
    threading.Timer(0.2, kept.gate.open.set).start()
    second = kept.keeper.save(8, {"global_step": 8}, whole=False)
    assert first.exists() and kept.keeper.newest == first and kept.verifier.path == first
    assert kept.keeper.take_held_seconds() >= 0.15 and kept.keeper.take_held_seconds() == 0.0
    kept.ended()
    assert kept.votes() == Votes(busy=True)  # 4 is still being verified, 8 waits for it
    assert kept.verifier.path == first
    kept.verifier.answer()
    kept.votes()
    assert kept.verifier.path == second == kept.keeper.newest


def test_the_next_save_raises_the_error_of_the_one_before(kept: Background) -> None:
    kept.begin(4)
    kept.ended(CheckpointError("no more room"))
    with pytest.raises(CheckpointError, match="no more room"):
        kept.keeper.save(8, {"global_step": 8}, whole=False)
    assert kept.gate.calls == 1


def test_a_stop_waits_and_makes_its_own(kept: Background) -> None:
    first = kept.begin(4)
    kept.gate.open.set()
    last = kept.save(5)
    assert kept.steps() == [4, 5] and kept.keeper.newest == last
    kept.keeper.close(lambda: pytest.fail("both verified"))
    assert kept.verifier.path == last and verify_checkpoint(first).step == 4


def test_the_end_waits_for_a_save_in_flight(kept: Background) -> None:
    kept.begin(4)
    kept.gate.open.set()
    kept.keeper.close(lambda: pytest.fail("it verified"))
    assert kept.steps() == [4]


def test_a_spoiled_one_is_known_by_name_though_another_has_landed(kept: Background) -> None:
    spoiled = kept.begin(4)
    kept.ended()
    kept.votes()
    kept.begin(8)
    kept.ended()
    kept.votes()
    kept.verifier.answer("does not match its checksum")
    assert kept.votes().spoiled and str(spoiled) in kept.warnings[0]
    kept.verifier.answer()
    assert kept.steps() == [8]


def test_the_way_back_from_a_spike_waits_for_the_save(kept: Background) -> None:
    path = kept.begin(4)
    kept.gate.open.set()
    assert kept.keeper.sound_checkpoint(None) == path


def test_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_model()
    control, _ = control_and_report(tmp_path)

    def mode(asked: str) -> saving.SavingMode:
        return saving.choose_saving(asked, trained, control)

    assert not mode("off").background and "(--async-checkpoint off)" in mode("off").text
    assert not mode("auto").background and "there is no GPU" in mode("auto").text
    need = saving.host_copy_bytes(trained.slice_map, 0)
    assert need >= 12 * trained.slice_map.numel()
    assert mode("on").background and f"{need:,} bytes of host memory a node" in mode("on").text
    monkeypatch.setattr(saving, "available_bytes", lambda: need)
    with pytest.raises(ConfigError, match=f"needs {need:,} bytes .* use --async-checkpoint off"):
        mode("on")
