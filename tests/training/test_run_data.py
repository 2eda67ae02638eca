"""Where the data of a run stands: after a step, in metrics, in checkpoints, and what was skipped."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.data.excluded import Exclusion
from argonne.files import OutputFolder
from argonne.training.run_data import RunData
from tests.training.small_run import run_config

SKIPS = [
    {"file_name": f"{name}.parquet", "row": row, "rows": 4, "reason": "a bad page"}
    for name, row in (("a", 0), ("b", 8), ("c", 12))
]


class Report:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.warnings: list[str] = []

    def note(self, **facts: Any) -> None:
        self.facts |= facts

    def warn(self, text: str, detail: str = "") -> None:
        self.warnings.append(f"{text} {detail}")


def progress(row: int, skips: int = 0) -> Any:
    return SimpleNamespace(row=row, skipped=tuple(SKIPS[:skips]), metrics=lambda: {"documents": row})


def run_data(start: Any = None) -> tuple[RunData, Report]:
    opened: Any = SimpleNamespace(
        start=start or progress(0),
        exclusion=Exclusion(),
        source_names=("web", "code", "books"),
        position_dict=lambda at: {"row": at.row},
        state_dict=lambda at: {"rows": at.row},
    )
    report: Any = Report()
    return RunData(opened=opened, report=report), report


def test_a_step_moves_the_place_and_gives_its_metrics() -> None:
    data, report = run_data()
    assert data.position() == {}
    data.begin()
    assert data.position() == {"row": 0} and report.facts == {"data_skipped": []}
    assert data.advance(progress(3)) == {"documents": 3}
    assert data.position() == {"row": 3} and report.warnings == []


def test_only_what_is_newly_skipped_is_told() -> None:
    data, report = run_data(progress(0, skips=1))
    data.begin()
    assert report.facts == {"data_skipped": SKIPS[:1]} and report.warnings == []
    assert data.advance(progress(9, skips=3)) == {"documents": 9, "data_skipped": SKIPS[1:]}
    assert report.facts == {"data_skipped": SKIPS}
    told = "data was skipped (--skip-bad-shards): 4 rows from row {} on of {}.parquet: a bad page"
    assert report.warnings == [told.format(8, "b"), told.format(12, "c")]
    assert data.advance(progress(10, skips=3)) == {"documents": 10} and len(report.warnings) == 2


def test_losses_are_means_over_the_tokens_of_sources_that_have_any() -> None:
    data, _ = run_data()
    found = data.source_losses([2, 0, 1], [64.0, 0.0, 24.0], block_size=8)
    assert found == {"loss_by_source": {"web": 4.0, "books": 3.0}}
    assert data.source_losses([1], [16.0], block_size=8) == {"loss_by_source": {"web": 2.0}}


@pytest.mark.parametrize("staged", [False, True])
def test_a_checkpoint_keeps_place_and_state_and_of_stages_the_source(staged: bool, tmp_path: Any) -> None:
    data, _ = run_data()
    config = run_config(tmp_path)
    assert data.metadata(config, staged=staged) == {}
    data.begin()
    data.advance(progress(5))
    data.places = {"old/*": {"data_position": {"row": 1}}}
    found = data.metadata(config, staged=staged)
    assert (found.pop("data_position"), found.pop("data_state")) == ({"row": 5}, {"rows": 5})
    key = " ".join(config.data.data_glob)
    more = {"data_source": {"key": key, "globs": list(config.data.data_glob)}, "data_places": data.places}
    assert found == (more if staged else {})


def test_other_ranks_have_no_place(tmp_path: Any) -> None:
    report: Any = Report()
    data = RunData(opened=None, report=report)
    data.begin()
    assert data.advance(None) == {} and data.position() == {} and report.facts == {}
    assert data.source_losses([1], [8.0], block_size=8) == {}
    assert data.metadata(run_config(tmp_path), staged=True) == {}


def test_a_list_of_excluded_documents_is_kept_and_named(tmp_path: Path) -> None:
    data, report = run_data()
    data.opened.exclusion = Exclusion.of({"web": {"a.parquet": [3]}})  # type: ignore[union-attr, misc]
    data.report.output = OutputFolder(tmp_path)
    data.begin()
    digest = data.advance(progress(1))["excluded_list"]
    assert Exclusion.read(OutputFolder(tmp_path).excluded(digest)) == data.opened.exclusion  # type: ignore[union-attr]
    data.report.output = OutputFolder(tmp_path / "stats" / "excluded_documents" / f"{digest}.jsonl")
    data.begin()
    assert "cannot be written" in report.warnings[-1]
