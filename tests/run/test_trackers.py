"""Trackers: what they are given, resumes that go on, a missing package, a service that fails."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from argonne.run.evaluations import ValidationRecord
from argonne.run.trackers import Trackers, flattened
from tests.run.test_report import begun, record

LINE = {
    "step": 7,
    "loss": 2.5,
    "skipped": "text",
    "loss_by_source": {"math": 1.5, "code": None},
    "nan": float("nan"),
    "infinite": float("inf"),
}


class Service(types.ModuleType):
    """wandb's and trackio's interface."""

    def __init__(self, name: str, *, failing: bool = False) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.failing = failing

    def init(self, **options: Any) -> Any:
        self.calls.append(("init", options))
        return types.SimpleNamespace(id=options.get("id") or "fresh")

    def log(self, values: dict[str, float], step: int) -> None:
        if self.failing:
            raise ConnectionError("no route\nto host")
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def start(name: str, folder: Path, warnings: list[str]) -> Trackers:
    (folder / "stats").mkdir(exist_ok=True)
    return Trackers([name], folder, first_step=6, config={"lr": 1}, warn=warnings.append)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_reach_the_service_and_a_resume_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    for _ in range(2):
        tracker = start(name, tmp_path, [])
        tracker.log(LINE)
        tracker.close()
    kinds = [kind for kind, _ in service.calls]
    assert kinds == ["init", "log", "finish"] * 2
    assert service.calls[1][1] == (7, {"loss": 2.5, "loss_by_source/math": 1.5})
    assert all(options["resume"] == "allow" for kind, options in service.calls if kind == "init")
    if name == "wandb":
        assert service.calls[3][1]["id"] == "fresh"


def test_tensorboard_hides_what_lies_beyond_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, written = types.ModuleType("torch.utils.tensorboard"), list[Any]()

    class SummaryWriter:
        def __init__(self, **options: Any) -> None:
            written.append(options)

        def add_scalar(self, *values: Any) -> None:
            written.append(values)

        def close(self) -> None: ...

    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tracker = start("tensorboard", tmp_path, [])
    tracker.log(LINE)
    tracker.close()
    assert written[0] == {"log_dir": str(tmp_path / "stats" / "tensorboard"), "purge_step": 7}
    assert written[1:] == [("loss", 2.5, 7), ("loss_by_source/math", 1.5, 7)]


def test_a_service_that_fails_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", Service("trackio", failing=True))
    warnings: list[str] = []
    tracker = start("trackio", tmp_path, warnings)
    tracker.log(LINE)
    tracker.log(LINE)
    tracker.close()
    assert warnings == ["--tracker trackio stopped (no route to host): the metrics file goes on"]


def test_a_run_feeds_its_steps_and_validations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service("trackio")
    monkeypatch.setitem(sys.modules, "trackio", service)
    (tmp_path / "stats").mkdir()
    report = begun(tmp_path, trackers=["trackio", "trackio"], settings={"--learning-rate": 1e-3})
    report.step(record(1))
    report.validation(
        ValidationRecord(step=1, name="held", loss=2.0, samples=1, tokens=8, text_bytes=0, seconds=0.1)
    )
    report.close()
    report.close()
    assert [kind for kind, _ in service.calls] == ["init", "log", "log", "finish"]
    assert service.calls[0][1]["config"] == {"--learning-rate": 1e-3}
    assert service.calls[1][1][1]["grad_norm"] == 1.5
    step, values = service.calls[2][1]
    assert step == 1 and values == {
        "validation/held/loss": 2.0,
        "validation/held/perplexity": pytest.approx(7.389056),
    }


def test_only_finite_numbers_are_sent() -> None:
    assert flattened(LINE) == {"step": 7, "loss": 2.5, "loss_by_source/math": 1.5}
